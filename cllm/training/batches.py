"""The endless stream of packed training steps, resumable at any step."""

import random
from collections.abc import Iterator, Sequence
from itertools import islice

from cllm.errors import InputError
from cllm.training.documents import Document
from cllm.training.packing import assign_rows
from cllm.training.sources import DocumentSource

RowOfDocuments = Sequence[Document]


class RowStream:
    """Rows of documents, epoch after epoch, each epoch shuffled and packed anew.

    The stream is a function of (source, row_tokens, seed); `state` is the place in it. Documents are made when their
    turn comes, so that an epoch is never in memory as a whole. One that is too long loses its last spans; one whose
    prompt and response alone do not fit is left out.

    Attributes:
        num_too_long: documents left out since the start or the last `restore`.
    """

    def __init__(self, source: DocumentSource, row_tokens: int, seed: int) -> None:
        self._source = source
        self._row_tokens = row_tokens
        self._seed = seed
        self._epoch, self._cursor, self.num_too_long = 0, 0, 0
        self._rows: Iterator[RowOfDocuments]
        self.restore({"epoch": 0, "cursor": 0})

    def take(self, count: int) -> list[RowOfDocuments]:
        """The next `count` rows.

        Raises:
            InputError: no document fits into a row.
        """
        taken: list[RowOfDocuments] = []
        while len(taken) < count:
            row = next(self._rows, None)
            if row is None:
                if self._cursor == 0:
                    raise InputError(f"{self.num_too_long} documents, and none fits into {self._row_tokens} tokens")
                self._epoch, self._cursor = self._epoch + 1, 0
                self._rows = self.epoch_rows(self._epoch)
            else:
                taken.append(row)
                self._cursor += 1
        return taken

    def epoch_rows(self, epoch: int) -> Iterator[RowOfDocuments]:
        """All rows of one epoch. A row is given once it is closed; at most some dozens are open at a time."""
        documents = self._source.documents(epoch)
        order = list(range(len(documents)))
        random.Random(f"{self._seed}/order/{epoch}").shuffle(order)
        waiting: dict[int, Document] = {}

        def lengths() -> Iterator[int]:
            for place, index in enumerate(order):
                document = documents[index].fitted(self._row_tokens)
                if document.num_tokens > self._row_tokens:
                    self.num_too_long += 1
                else:
                    waiting[place] = document
                yield document.num_tokens

        for row in assign_rows(lengths(), self._row_tokens):
            yield [waiting.pop(place) for place in row]

    @property
    def state(self) -> dict[str, int]:
        return {"epoch": self._epoch, "cursor": self._cursor}

    def restore(self, state: dict[str, int]) -> None:
        """Go to a place. The rows of its epoch before it are packed again, for what they hold decides what is left."""
        self.num_too_long = 0
        self._epoch, self._cursor = state["epoch"], state["cursor"]
        self._rows = islice(self.epoch_rows(self._epoch), self._cursor, None)
