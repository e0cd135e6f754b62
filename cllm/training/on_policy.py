"""On-policy states: the student's own Jacobi iterations refine the noisy spans before it is trained on them.

At inference the student meets its own predictions, not the teacher's. All windows of all responses iterate at once, for
what precedes a window is known: one packed forward without gradient is one iteration of them all (the on-policy idea of
the paper's section 4.3, without a second collection).

Shapes: T noisy tokens.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

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
        predictions = iter(objective(packed, _predicting_T(packed)).tolist())
        return [[self._moved(document, predictions) for document in row] for row in rows]

    def _moved(self, document: Document, predictions: Iterator[int]) -> Document:
        moved = [self._move(document, span, tuple(islice(predictions, len(span.tokens)))) for span in document.spans]
        return replace(document, spans=tuple([span for span in moved if span is not None]))

    def _move(self, document: Document, span: Span, state: tuple[int, ...]) -> Span | None:
        if state[0] != document.response_ids[span.start]:
            return Span(span.start, state)
        end = span.start + len(state)
        refill: tuple[int, ...] = ()
        if end < len(document.response_ids):
            refill = self.guess.tokens(document.prompt_ids, end, self.seed)
        new = make_span(document.response_ids, span.start, state + refill, (), local=False)
        return None if new is None else Span(new.start, new.tokens[: len(state)])


def _predicting_T(packed: PackedRows) -> torch.Tensor:
    """Flat indices of the tokens that predict `student_T`: the one before each, for a span's first the clean one."""
    student_T = packed.student_T
    place_T = student_T % packed.tokens_RL.shape[1]
    context_end_T = packed.context_end_RL.flatten()[student_T]
    is_first_T = packed.own_start_RL.flatten()[student_T] == place_T
    return student_T - torch.where(is_first_T, place_T - context_end_T, 0) - 1
