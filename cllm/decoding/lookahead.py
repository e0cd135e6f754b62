"""Lookahead decoding (Fu et al. 2024, arXiv 2402.02057): Jacobi iteration that collects n-grams, which are verified.

One forward pass does two things for the seed (the last committed token), side by side under one attention mask:

- The lookahead branch iterates W columns. A column holds N - 1 tokens at consecutive positions, one of each of the
  last N - 1 iterations (its levels); the forward predicts the next one. Column c starts c positions behind the seed,
  the seed itself being level 0 of column 0; a token sees level 0 up to its own column and the older levels of its
  column. Every column and its prediction are an n-gram, which goes into a pool.
- The verification branch checks up to G n-grams of the pool that begin with the seed: those of their tokens that the
  model predicts are committed, and one more behind them.

Only predictions are committed, so the output is AR's whatever the pool holds. A draw depends on the context, the
request's seed and the position alone (`cllm.decoding.sampling`), so that holds for sampling as well.

Shapes: T inputs of both branches, Q all inputs of a forward (with the prompt in the first one), P predictions read,
V vocabulary.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PreTrainedModel

from cllm.decoding.cache import RowCache
from cllm.decoding.config import GuessKind
from cllm.decoding.guess import Guesser
from cllm.decoding.records import Commit, DecodeRequest, DecodeResult, FinishReason
from cllm.decoding.sampling import TokenPicker
from cllm.decoding.step import masked_logits_BWV
from cllm.errors import InputError


@dataclass(frozen=True)
class Branches:
    """Order, offsets and visibility of a forward's inputs: level after level, then candidate after candidate.

    The inputs for fewer candidates are the first ones of those for all.
    """

    window: int  # W
    ngram: int  # N
    candidates: int  # G

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


class _LookaheadRow:
    """State of one request between forward passes. No tensors."""

    def __init__(
        self, request: DecodeRequest, branches: Branches, guesser: Guesser, eos_ids: frozenset[int], pool_text: bool
    ) -> None:
        self.branches = branches
        self.pool = CandidatePool(branches.ngram, branches.candidates)
        self.tokens = list(request.prompt_ids)
        self.accepted: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._num_prompt = len(request.prompt_ids)
        self._max_length = self._num_prompt + request.max_new_tokens
        self._guesser = guesser
        self._eos_ids = eos_ids
        self._pool_text = pool_text
        if pool_text:
            self.pool.add(request.prompt_ids)
        self._levels = self._filled([[] for _ in range(branches.ngram - 1)])

    @property
    def seed_position(self) -> int:
        return len(self.tokens) - 1

    def inputs(self, candidates: Sequence[tuple[int, ...]]) -> list[int]:
        """Tokens of both branches, the seed first."""
        return [token for run in (*self._levels, *candidates) for token in run]

    def commit(self, tokens: Sequence[int], newest: list[int]) -> list[int]:
        """Commit predictions up to one that ends the response, and move the window behind them.

        `newest` are the predictions of the newest level, one a column.
        """
        for column in zip(*self._levels, newest, strict=True):
            self.pool.add(column)
        committed = list(tokens[: self._max_length - len(self.tokens)])
        end = next((i for i, token in enumerate(committed) if token in self._eos_ids), None)
        if end is not None:
            committed, self.finish_reason = committed[: end + 1], "stop"
        elif len(self.tokens) + len(committed) == self._max_length:
            self.finish_reason = "length"
        self.tokens += committed
        self.accepted.append(len(committed))
        if self._pool_text:
            self.pool.add(self.tokens[-len(committed) - self.branches.ngram + 1 :])
        passed = len(committed) - 1  # columns that now start before the seed: a level later starts a position later
        self._levels = self._filled([level[passed:] for level in (*self._levels[1:], newest)])
        return committed

    def result(self) -> DecodeResult:
        assert self.finish_reason is not None
        return DecodeResult(tuple(self.tokens[self._num_prompt :]), self.finish_reason, tuple(self.accepted))

    def _filled(self, levels: list[list[int]]) -> list[list[int]]:
        """The levels with guesses for the columns that have no tokens yet, and the seed in its place."""
        filled = []
        for number, level in enumerate(levels):
            start = self.seed_position + number + len(level)
            filled.append(level + self._guesser.guess(start, self.branches.window - len(level)))
        filled[0][0] = self.tokens[-1]
        return filled


class LookaheadDecoder:
    """Lookahead decoding with a key-value cache, one request after the other.

    Args:
        model: a causal language model of transformers, in eval mode.
        window: W, columns iterated in parallel.
        ngram: N, tokens of an n-gram; a forward commits at most that many.
        candidates: G, n-grams verified in a forward, at most.
        eos_ids: tokens that end a response (they are part of it).
        pad_id: the guess of kind "pad".
        guess: how columns are first filled.
        pool_text: collect the n-grams of the prompt and of the response, too, not those of the columns alone.

    Raises:
        InputError: `window` or `candidates` below 1, or `ngram` below 2.

    The output of a request is AR's, up to rounding of the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        window: int,
        ngram: int,
        candidates: int,
        eos_ids: Sequence[int],
        pad_id: int,
        guess: GuessKind = "prompt",
        pool_text: bool = True,
    ) -> None:
        for name, value, least in (("window", window, 1), ("ngram", ngram, 2), ("candidates", candidates, 1)):
            if value < least:
                raise InputError(f"{name} must be >= {least}, got {value}")
        self.model = model
        self.branches = Branches(window, ngram, candidates)
        self.eos_ids = frozenset(eos_ids)
        self.pad_id = pad_id
        self.guess: GuessKind = guess
        self.pool_text = pool_text

    def generate(self, requests: Sequence[DecodeRequest]) -> list[DecodeResult]:
        """Decode all requests; results in their order.

        Raises:
            InputError: a request asks for more than a draw (`cllm.decoding.sampling.TokenPicker`).
        """
        rows = [self._open(request) for request in requests]
        for row, request in zip(rows, requests, strict=True):
            for _ in self._run(row, request):
                pass
        return [row.result() for row in rows]

    def stream(self, requests: Sequence[DecodeRequest]) -> Iterator[list[Commit]]:
        """The same, yielding after every forward pass what it committed: one `Commit`."""
        for index, request in enumerate(requests):
            row = self._open(request)
            for tokens in self._run(row, request):
                yield [Commit(index, tuple(tokens), row.finish_reason)]

    def _open(self, request: DecodeRequest) -> _LookaheadRow:
        guesser = Guesser(self.guess, request.prompt_ids, self.pad_id, request.sampling.seed)
        return _LookaheadRow(request, self.branches, guesser, self.eos_ids, pool_text=self.pool_text)

    @torch.inference_mode()
    def _run(self, row: _LookaheadRow, request: DecodeRequest) -> Iterator[list[int]]:
        picker = TokenPicker([request.sampling], self.model.device)
        cache = RowCache(self.model.config, len(request.prompt_ids) + request.max_new_tokens + self.branches.num_inputs)
        unread = list(request.prompt_ids[:-1])
        while row.finish_reason is None:
            yield self._step(row, cache, picker, unread)
            unread = []

    def _step(self, row: _LookaheadRow, cache: RowCache, picker: TokenPicker, unread: list[int]) -> list[int]:
        """One forward pass over both branches, and over `unread` tokens before the seed."""
        candidates = row.pool.candidates(row.tokens[-1])
        seed = row.seed_position
        predicted = self._predict(cache, picker, unread, row.inputs(candidates), seed)
        run, place = _longest(candidates, predicted, self.branches)
        newest = [predicted[t] for t in self.branches.newest]
        if len(run) > 1:
            # Where the candidate's tokens would lie had they been fed one by one.
            kept = torch.arange(len(run) - 1, device=self.model.device)
            cache.move(seed + place.start + kept, seed + 1 + kept)
        return row.commit(run, newest)

    def _predict(
        self, cache: RowCache, picker: TokenPicker, unread: list[int], inputs: list[int], seed: int
    ) -> dict[int, int]:
        """What the model predicts behind the seed, the newest level and the candidates, by index of the input."""
        device, branches = self.model.device, self.branches
        size = len(inputs)
        slots_1Q = torch.arange(seed - len(unread), seed + size, device=device)[None]
        mask = cache.place(slots_1Q, seed + size)
        mask[..., -size:, -size:] &= branches.visible_TT[:size, :size].to(device)
        positions_1Q = slots_1Q.clone()
        positions_1Q[0, -size:] = seed + branches.offsets_T[:size].to(device)
        tokens_1Q = torch.tensor([unread + inputs], device=device)
        read = sorted({0, *branches.newest, *range(branches.num_lookahead, size)})
        read_1P = torch.tensor([read], device=device) + len(unread)
        logits_1PV = masked_logits_BWV(self.model, cache, tokens_1Q, positions_1Q, mask, read_1P)
        picked = picker.pick_BQ(logits_1PV, positions_1Q.gather(1, read_1P) + 1, [0])[0].tolist()
        return dict(zip(read, picked, strict=True))


def _longest(
    candidates: Sequence[tuple[int, ...]], predicted: dict[int, int], branches: Branches
) -> tuple[list[int], range]:
    """The longest run of predictions that a candidate confirms, one more than it confirms, and the inputs it used."""
    best, place = [predicted[0]], range(0)
    for index, candidate in enumerate(candidates):
        run = [predicted[0]]
        for token, t in zip(candidate, branches.candidate(index), strict=True):
            if token != run[-1]:
                break
            run.append(predicted[t])
        if len(run) > len(best):
            best, place = run, branches.candidate(index)
    return best, place
