"""The endless stream of packed training steps, resumable at any step."""

import random
from collections.abc import Sequence

from cllm.errors import InputError
from cllm.training.documents import Document
from cllm.training.packing import assign_rows
from cllm.training.sources import DocumentSource

RowOfDocuments = Sequence[Document]


class RowStream:
    """Rows of documents, epoch after epoch, each epoch shuffled and packed anew.

    The stream is a function of (source, row_tokens, seed); `state` is the place in it. A document that is too long
    loses its last spans; one whose prompt and response alone do not fit is left out (`num_too_long` in each epoch).

    Raises:
        InputError: no document fits into a row.
    """

    def __init__(self, source: DocumentSource, row_tokens: int, seed: int) -> None:
        self._source = source
        self._row_tokens = row_tokens
        self._seed = seed
        self._epoch = 0
        self._cursor = 0
        self._rows = self._pack_epoch()

    @property
    def rows_per_epoch(self) -> int:
        return len(self._rows)

    def take(self, count: int) -> list[RowOfDocuments]:
        """The next `count` rows."""
        taken: list[RowOfDocuments] = []
        while len(taken) < count:
            if self._cursor == len(self._rows):
                self._epoch, self._cursor = self._epoch + 1, 0
                self._rows = self._pack_epoch()
            taken.append(self._rows[self._cursor])
            self._cursor += 1
        return taken

    @property
    def state(self) -> dict[str, int]:
        return {"epoch": self._epoch, "cursor": self._cursor}

    def restore(self, state: dict[str, int]) -> None:
        self._epoch, self._cursor = state["epoch"], state["cursor"]
        self._rows = self._pack_epoch()

    def _pack_epoch(self) -> list[RowOfDocuments]:
        documents = [document.fitted(self._row_tokens) for document in self._source.documents(self._epoch)]
        random.Random(f"{self._seed}/order/{self._epoch}").shuffle(documents)
        lengths = [document.num_tokens for document in documents]
        self.num_too_long = sum(length > self._row_tokens for length in lengths)
        assigned = assign_rows(lengths, self._row_tokens)
        if not assigned:
            raise InputError(f"no document fits into a row of {self._row_tokens} tokens ({len(documents)} documents)")
        return [[documents[i] for i in row] for row in assigned]
