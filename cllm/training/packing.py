"""Documents packed tightly into rows of fixed length, and the attention mask that keeps them apart.

A document lies in its row as [prompt][response][span][span]...: one forward gives AR logits and teacher logits (on the
clean response) and student logits (on the spans), where the paper's code makes three forwards a block.

Shapes: R rows, L row length (tokens).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from cllm.training.documents import Document, Span

IGNORED = -1
_OPEN_ROWS = 64  # rows that first-fit looks at; more would pack little tighter


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Packed rows as tensors, all int64 [R, L].

    Attributes:
        tokens_RL: token ids, `pad_id` behind the last document.
        positions_RL: position ids; a span's tokens have those of the clean tokens they stand for.
        document_RL: index of the document in its row; IGNORED is padding.
        group_RL: 0 for clean tokens, otherwise the index of the span in its document.
        context_RL: position before which a token sees clean tokens: of a span's token, the span's start; of a clean
            token 0, for it sees the clean ones as members of its own group.
        label_RL: the token that the AR loss expects next, or IGNORED.
        target_RL: index in the row of the token whose prediction is the consistency target, or IGNORED.
    """

    tokens_RL: torch.Tensor
    positions_RL: torch.Tensor
    document_RL: torch.Tensor
    group_RL: torch.Tensor
    context_RL: torch.Tensor
    label_RL: torch.Tensor
    target_RL: torch.Tensor

    def to(self, device: torch.device) -> "PackedRows":
        return PackedRows(*(getattr(self, name).to(device, non_blocking=True) for name in self.__slots__))

    @property
    def num_tokens(self) -> int:
        return int((self.document_RL != IGNORED).sum())


def visible_RLL(rows: PackedRows) -> torch.Tensor:
    """The attention mask, bool [R, L queries, L keys]: the dense twin of the FlexAttention mask in `masks`.

    A token sees, in its own document, the clean tokens before its context position, and its own group up to itself.
    """
    document, group, position = rows.document_RL, rows.group_RL, rows.positions_RL
    same_document = document[:, :, None] == document[:, None, :]
    clean_context = (group[:, None, :] == 0) & (position[:, None, :] < rows.context_RL[:, :, None])
    own_group = (group[:, :, None] == group[:, None, :]) & (position[:, None, :] <= position[:, :, None])
    return same_document & (clean_context | own_group)


def assign_rows(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """First-fit: indices of documents for each row, in order of first use; too long documents are left out."""
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (row, tokens left), oldest first
    for index, length in enumerate(lengths):
        if length > row_tokens:
            continue
        for slot, (row, left) in enumerate(free):
            if length <= left:
                rows[row].append(index)
                free[slot] = (row, left - length)
                break
        else:
            rows.append([index])
            free.append((len(rows) - 1, row_tokens - length))
            if len(free) > _OPEN_ROWS:
                free.remove(min(free, key=lambda entry: entry[1]))
    return rows


def pack(rows: Sequence[Iterable[Document]], row_tokens: int, pad_id: int) -> PackedRows:
    """Lay the documents of each row one behind the other. They must fit (see `assign_rows`)."""
    columns = [_RowWriter(row_tokens, pad_id) for _ in rows]
    for writer, documents in zip(columns, rows, strict=True):
        for document in documents:
            writer.write(document)
    return PackedRows(*(torch.tensor(data) for data in zip(*(writer.columns() for writer in columns), strict=True)))


class _RowWriter:
    """Builds one packed row."""

    def __init__(self, row_tokens: int, pad_id: int) -> None:
        self.row_tokens = row_tokens
        self.pad_id = pad_id
        self.num_documents = 0
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.documents: list[int] = []
        self.groups: list[int] = []
        self.contexts: list[int] = []
        self.labels: list[int] = []
        self.targets: list[int] = []

    def write(self, document: Document) -> None:
        clean = document.prompt_ids + document.response_ids
        first = len(self.tokens)
        self._extend(clean, 0, group=0, context=0)
        if document.learn_response:
            prompt = len(document.prompt_ids)
            labels = [IGNORED] * (prompt - 1) + list(document.response_ids) + [IGNORED]
            self.labels[first:] = labels
        for index, span in enumerate(document.spans):
            self._write_span(span, len(document.prompt_ids), first, group=2 * index + 1)
        self.num_documents += 1

    def _write_span(self, span: Span, prompt: int, first: int, group: int) -> None:
        start = prompt + span.start
        begin = len(self.tokens)
        self._extend(span.tokens, start, group=group, context=start)
        target = first + start
        if span.target is not None:
            target = len(self.tokens)
            self._extend(span.target.tokens, start, group=group + 1, context=start)
        for offset in range(len(span.tokens)):
            self.targets[begin + offset] = target + offset

    def _extend(self, tokens: Sequence[int], position: int, *, group: int, context: int) -> None:
        count = len(tokens)
        self.tokens += tokens
        self.positions += range(position, position + count)
        self.documents += [self.num_documents] * count
        self.groups += [group] * count
        self.contexts += [context] * count
        self.labels += [IGNORED] * count
        self.targets += [IGNORED] * count

    def columns(self) -> tuple[list[int], ...]:
        missing = self.row_tokens - len(self.tokens)
        assert missing >= 0, f"{len(self.tokens)} tokens in a row of {self.row_tokens}"
        # Padding is a document of its own, so that each padding token sees itself and no softmax row is empty.
        fills = (self.pad_id, 0, IGNORED, 0, 0, IGNORED, IGNORED)
        lists = (self.tokens, self.positions, self.documents, self.groups, self.contexts, self.labels, self.targets)
        return tuple(values + [fill] * missing for values, fill in zip(lists, fills, strict=True))
