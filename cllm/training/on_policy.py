"""On-policy states: the student's own Jacobi iterations refine the noisy spans before it is trained on them.

At inference the student meets its own predictions, not the teacher's. All windows of all responses iterate at once, for
what precedes a window is known: one packed forward without gradient is one iteration of them all (the on-policy idea of
the paper's section 4.3, without a second collection).
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from cllm.training.batches import RowOfDocuments
from cllm.training.documents import Document, Span
from cllm.training.forward import PackedObjective
from cllm.training.packing import PackedRows
from cllm.training.sources import WindowGuess, make_span


@dataclass(frozen=True, slots=True)
class Refiner:
    """Advances spans by 0 to `max_iterations` Jacobi iterations, as many for all rows of a step."""

    max_iterations: int
    guess: WindowGuess
    seed: int

    def iterations_at(self, step: int) -> int:
        """A pure function of the step, so that a resumed run repeats it and all workers agree."""
        return random.Random(f"{self.seed}/iterations/{step}").randint(0, self.max_iterations)

    @torch.no_grad()
    def advance(
        self, objective: PackedObjective, rows: Sequence[RowOfDocuments], packed: PackedRows
    ) -> list[list[Document]]:
        """One Jacobi iteration with sliding refill: every span moves behind its converged tokens and gets new guesses.

        A span never grows, so the new rows fit where the old ones did.
        """
        indices, sizes = _prediction_places(rows, packed.tokens_RL.shape[1])
        if not indices:
            return [list(row) for row in rows]
        predicted = objective(packed, torch.tensor(indices, device=packed.tokens_RL.device)).tolist()
        states = iter(_split(predicted, sizes))
        return [[self._moved(document, states) for document in row] for row in rows]

    def _moved(self, document: Document, states: Iterator[tuple[int, ...]]) -> Document:
        moved = (self._move(document, span, next(states)) for span in document.spans)
        return replace(document, spans=tuple(span for span in moved if span is not None))

    def _move(self, document: Document, span: Span, state: tuple[int, ...]) -> Span | None:
        end = span.start + len(state)
        refill: tuple[int, ...] = ()
        if end < len(document.response_ids):
            refill = self.guess.tokens(document.prompt_ids, document.response_ids, end, self.seed)
        new = make_span(document.response_ids, span.start, state + refill, (), local=False)
        return None if new is None else replace(new, tokens=new.tokens[: len(state)])


def _prediction_places(rows: Sequence[RowOfDocuments], row_tokens: int) -> tuple[list[int], list[int]]:
    """Flat indices of the inputs that predict each span's tokens (the clean one before it, then its own), span by span,
    and each span's size."""
    indices: list[int] = []
    sizes: list[int] = []
    for number, row in enumerate(rows):
        first = number * row_tokens
        for document in row:
            begin = first + len(document.prompt_ids) + len(document.response_ids)
            for span in document.spans:
                indices += [
                    first + len(document.prompt_ids) + span.start - 1,
                    *range(begin, begin + len(span.tokens) - 1),
                ]
                sizes.append(len(span.tokens))
                begin += len(span.tokens)
            first += document.num_tokens
    return indices, sizes


def _split(values: list[int], sizes: list[int]) -> Iterator[tuple[int, ...]]:
    start = 0
    for size in sizes:
        yield tuple(values[start : start + size])
        start += size
