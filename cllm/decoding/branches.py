"""What lookahead decoding feeds and what it learns from, for every decoder that does it (`cllm.decoding.lookahead`
explains the method).

Shapes: T inputs of both branches.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from cllm.decoding.guess import Guesser
from cllm.errors import InputError


@dataclass(frozen=True)
class Branches:
    """Order, offsets and visibility of a forward's inputs: level after level, then candidate after candidate.

    The inputs for fewer candidates are the first ones of those for all.

    Raises:
        InputError: no column, no candidate, or n-grams of less than two tokens.
    """

    window: int  # W
    ngram: int  # N
    candidates: int  # G

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("ngram", 2), ("candidates", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be >= {least}, got {getattr(self, name)}")

    @property
    def num_lookahead(self) -> int:
        return self.window * (self.ngram - 1)

    @property
    def num_inputs(self) -> int:
        return self.num_lookahead + self.candidates * (self.ngram - 1)

    @property
    def newest(self) -> range:
        """Inputs of the newest level, whose predictions complete the columns' n-grams."""
        return range(self.num_lookahead - self.window, self.num_lookahead)

    @cached_property
    def read(self) -> tuple[int, ...]:
        """Inputs whose predictions are of use, in order: the seed, the newest level, the candidates."""
        return tuple(sorted({0, *self.newest, *range(self.num_lookahead, self.num_inputs)}))

    def candidate(self, index: int) -> range:
        """Inputs of a candidate."""
        start = self.num_lookahead + index * (self.ngram - 1)
        return range(start, start + self.ngram - 1)

    @cached_property
    def offsets_T(self) -> torch.Tensor:
        """Positions behind the seed's, int64."""
        columns = [level + column for level in range(self.ngram - 1) for column in range(self.window)]
        return torch.tensor(columns + list(range(1, self.ngram)) * self.candidates)

    @cached_property
    def visible_TT(self) -> torch.Tensor:
        """Whether input [t, :] sees input [:, t], bool; all of them see what was committed before the seed."""
        visible_TT = torch.eye(self.num_inputs, dtype=torch.bool)
        for column in range(self.window):
            of_column = range(column, self.num_lookahead, self.window)
            for level, t in enumerate(of_column):
                visible_TT[t, : column + 1] = True
                visible_TT[t, list(of_column[:level])] = True
        for index in range(self.candidates):
            tokens = self.candidate(index)
            for t in tokens:
                visible_TT[t, 0] = True
                visible_TT[t, tokens.start : t] = True
        return visible_TT


class CandidatePool:
    """For every first token, the continuations of the n-grams seen last, `size` at most."""

    def __init__(self, ngram: int, size: int) -> None:
        self.ngram = ngram
        self.size = size
        self._seen: dict[int, OrderedDict[tuple[int, ...], None]] = {}

    def add(self, tokens: Sequence[int]) -> None:
        """Add every n-gram of a run of tokens."""
        for start in range(len(tokens) - self.ngram + 1):
            seen = self._seen.setdefault(tokens[start], OrderedDict())
            rest = tuple(tokens[start + 1 : start + self.ngram])
            seen[rest] = None
            seen.move_to_end(rest)
            if len(seen) > self.size:
                seen.popitem(last=False)

    def candidates(self, token: int) -> list[tuple[int, ...]]:
        """Continuations of `token`, the latest first."""
        return list(reversed(self._seen.get(token, ())))


class LookaheadState:
    """The columns and the pool of one request, between forward passes. No tensors.

    Args:
        tokens: of the request so far; the last one is the seed.
        pool_text: collect the n-grams of `tokens` and of what is committed, too, not those of the columns alone.

    Attributes:
        seed_position: where the seed stands among the request's tokens.
    """

    def __init__(self, branches: Branches, guesser: Guesser, tokens: Sequence[int], *, pool_text: bool) -> None:
        self.branches = branches
        self.pool = CandidatePool(branches.ngram, branches.candidates)
        self.seed_position = len(tokens) - 1
        self._guesser = guesser
        self._pool_text = pool_text
        if pool_text:
            self.pool.add(tokens)
        self._latest = list(tokens[-branches.ngram :])  # the seed last
        self._levels = self._filled([[] for _ in range(branches.ngram - 1)])
        self._candidates: list[tuple[int, ...]] = []

    def inputs(self) -> list[int]:
        """Tokens of the next forward, the seed first; of fewer candidates than G if the pool knows no more."""
        self._candidates = self.pool.candidates(self._latest[-1])
        return [token for run in (*self._levels, *self._candidates) for token in run]

    def confirmed(self, predicted: Mapping[int, int]) -> tuple[list[int], range]:
        """The longest run of predictions that a candidate confirms, one more than it confirms.

        Args:
            predicted: by index of the input, for those of `Branches.read` that were fed.

        Returns:
            The run, and the inputs of that candidate (none if the run is a single token).
        """
        best, place = [predicted[0]], range(0)
        for index, candidate in enumerate(self._candidates):
            run = [predicted[0]]
            for token, t in zip(candidate, self.branches.candidate(index), strict=True):
                if token != run[-1]:
                    break
                run.append(predicted[t])
            if len(run) > len(best):
                best, place = run, self.branches.candidate(index)
        return best, place

    def advance(self, committed: Sequence[int], predicted: Mapping[int, int]) -> None:
        """Learn from a forward's predictions, and move the columns behind the tokens that it committed."""
        newest = [predicted[t] for t in self.branches.newest]
        for column in zip(*self._levels, newest, strict=True):
            self.pool.add(column)
        recent = self._latest[1 - self.branches.ngram :] + list(committed)
        if self._pool_text:
            self.pool.add(recent)
        self._latest = recent
        self.seed_position += len(committed)
        passed = len(committed) - 1  # columns that now start before the seed: a level later starts a position later
        self._levels = self._filled([level[passed:] for level in (*self._levels[1:], newest)])

    def _filled(self, levels: list[list[int]]) -> list[list[int]]:
        """The levels with guesses for the columns that have no tokens yet, and the seed in its place."""
        filled = []
        for number, level in enumerate(levels):
            start = self.seed_position + number + len(level)
            filled.append(level + self._guesser.guess(start, self.branches.window - len(level)))
        filled[0][0] = self._latest[-1]
        return filled
