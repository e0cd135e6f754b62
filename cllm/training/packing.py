"""Documents packed tightly into rows of fixed length, and the attention mask that keeps them apart.

A document lies in its row as [prompt][response][span][span]...: one forward gives AR logits and teacher logits (on the
clean response) and student logits (on the spans), where the paper's code makes three forwards a block.

Shapes: R rows, L row length (tokens), N = R * L, P pieces (clean tokens of a document, or one span), T some tokens.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from cllm.training.documents import Document

_NO_TARGET = -1
_OPEN_ROWS = 64  # rows that first-fit looks at; more would pack little tighter


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Packed rows as int64 tensors.

    A token sees two runs of its row: the clean tokens before its span, and its own group (the clean tokens of its
    document, or its span) up to itself. Padding tokens see only themselves, so that no softmax row is empty.

    Attributes:
        tokens_RL: token ids, `pad_id` behind the last document.
        positions_RL: position ids; a span's tokens have those of the clean tokens they stand for.
        context_start_RL, context_end_RL: the clean tokens before a token's span, from and up to without; of clean
            tokens empty, for they see each other as members of their own group.
        own_start_RL: where a token's own group begins.
        ar_T: flat indices of the tokens whose successor is an AR label, ascending.
        student_T: flat indices of the tokens that bear a consistency loss, ascending.
        teacher_T: for each of `student_T`, the flat index of the token whose prediction is its target.
    """

    tokens_RL: torch.Tensor
    positions_RL: torch.Tensor
    context_start_RL: torch.Tensor
    context_end_RL: torch.Tensor
    own_start_RL: torch.Tensor
    ar_T: torch.Tensor
    student_T: torch.Tensor
    teacher_T: torch.Tensor

    def to(self, device: torch.device) -> "PackedRows":
        """A copy on `device`; for a GPU it is queued, and the caller goes on at once."""
        tensors = (getattr(self, name) for name in self.__slots__)
        if device.type == "cuda":  # only from pinned memory does a copy not wait
            tensors = (tensor.pin_memory() for tensor in tensors)
        return PackedRows(*(tensor.to(device, non_blocking=True) for tensor in tensors))


def visible_RLL(rows: PackedRows) -> torch.Tensor:
    """The attention mask, bool [R, L queries, L keys]: the dense twin of the FlexAttention mask in `masks`."""
    key_L = torch.arange(rows.tokens_RL.shape[1], device=rows.tokens_RL.device)
    context_RLL = (rows.context_start_RL[..., None] <= key_L) & (key_L < rows.context_end_RL[..., None])
    own_RLL = (rows.own_start_RL[..., None] <= key_L) & (key_L <= key_L[:, None])
    return context_RLL | own_RLL


def assign_rows(lengths: Iterable[int], row_tokens: int) -> Iterator[list[int]]:
    """First-fit: indices of documents for each row, as rows are closed; too long documents are left out.

    Of the lengths, which may come from an iterator, no more are taken than a row needs to be closed.
    """
    rows: list[list[int]] = []  # still open, oldest first
    free: list[int] = []  # tokens left in them
    for index, length in enumerate(lengths):
        if length > row_tokens:
            continue
        for slot, left in enumerate(free):
            if length <= left:
                rows[slot].append(index)
                free[slot] -= length
                break
        else:
            rows.append([index])
            free.append(row_tokens - length)
            if len(rows) > _OPEN_ROWS:
                fullest = free.index(min(free))
                del free[fullest]
                yield rows.pop(fullest)
    yield from rows


def pack(rows: Sequence[Iterable[Document]], row_tokens: int, pad_id: int) -> PackedRows:
    """Lay the documents of each row one behind the other. They must fit (see `assign_rows`)."""
    pieces = _Pieces()
    for number, documents in enumerate(rows):
        end = number * row_tokens
        for document in documents:
            end = pieces.add(document, end)
        assert end <= (number + 1) * row_tokens, f"{end - number * row_tokens} tokens in a row of {row_tokens}"
    return pieces.as_rows(len(rows), row_tokens, pad_id)


class _Pieces:
    """Lists the pieces of documents (the only loop in Python), then makes the columns of all their tokens at once."""

    def __init__(self) -> None:
        self.tokens: list[Sequence[int]] = []
        self.layout: list[tuple[int, int, int, int, int]] = []

    def add(self, document: Document, first: int) -> int:
        """Put a document behind the others, from the flat index `first` on; returns where it ends."""
        prompt, clean = len(document.prompt_ids), document.prompt_ids + document.response_ids
        end = first + len(clean)
        labelled = first + prompt - 1 if document.learn_response else end
        self._add(clean, first, first, 0, labelled, _NO_TARGET)
        for span in document.spans:
            place, position = end, prompt + span.start
            end += len(span.tokens)
            target = first + position if span.target is None else end
            self._add(span.tokens, place, first, position, end, target)
            if span.target is not None:
                end += len(span.target.tokens)
                self._add(span.target.tokens, target, first, position, end, _NO_TARGET)
        return end

    def _add(self, tokens: Sequence[int], place: int, document: int, position: int, labelled: int, target: int) -> None:
        """All but the first position are flat indices: of the piece, its document, its first token that bears an AR
        label (its end if none does), and the target of its first token."""
        self.tokens.append(tokens)
        self.layout.append((place, document, position, labelled, target))

    def as_rows(self, num_rows: int, row_tokens: int, pad_id: int) -> PackedRows:
        size_P = np.fromiter(map(len, self.tokens), np.int64, len(self.tokens))
        place_P, document_P, position_P, labelled_P, target_P = np.array(self.layout, np.int64).reshape(-1, 5).T
        row_P = place_P - place_P % row_tokens
        offset_T = np.arange(size_P.sum()) - np.repeat(size_P.cumsum() - size_P, size_P)
        place_T = np.repeat(place_P, size_P) + offset_T

        def column(values_T: np.ndarray, padding: int | np.ndarray) -> torch.Tensor:
            values_N = np.empty(num_rows * row_tokens, np.int64)
            values_N[:] = padding
            values_N[place_T] = values_T
            return torch.from_numpy(values_N.reshape(num_rows, row_tokens))

        labelled_T = place_T >= np.repeat(labelled_P, size_P)
        labelled_T &= place_T < np.repeat(place_P + size_P - 1, size_P)
        target_T = np.repeat(target_P, size_P)
        noisy_T = target_T != _NO_TARGET
        return PackedRows(
            tokens_RL=column(np.fromiter(chain.from_iterable(self.tokens), np.int64, len(place_T)), pad_id),
            positions_RL=column(np.repeat(position_P, size_P) + offset_T, 0),
            context_start_RL=column(np.repeat(document_P - row_P, size_P), 0),
            context_end_RL=column(np.repeat(document_P - row_P + position_P, size_P), 0),
            own_start_RL=column(np.repeat(place_P - row_P, size_P), np.arange(num_rows * row_tokens) % row_tokens),
            ar_T=torch.from_numpy(place_T[labelled_T]),
            student_T=torch.from_numpy(place_T[noisy_T]),
            teacher_T=torch.from_numpy((target_T + offset_T)[noisy_T]),
        )
