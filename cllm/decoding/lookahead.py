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

from collections.abc import Iterator, Mapping, Sequence

import torch
from transformers import PreTrainedModel

from cllm.decoding.branches import Branches, LookaheadState
from cllm.decoding.cache import RowCache
from cllm.decoding.config import GuessKind
from cllm.decoding.guess import Guesser
from cllm.decoding.records import Commit, DecodeRequest, DecodeResult, FinishReason
from cllm.decoding.sampling import TokenPicker
from cllm.decoding.step import masked_logits_BWV


class _LookaheadRow:
    """One request: its tokens, and what ends it. No tensors."""

    def __init__(self, request: DecodeRequest, state: LookaheadState, eos_ids: frozenset[int]) -> None:
        self.state = state
        self.tokens = list(request.prompt_ids)
        self.accepted: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._num_prompt = len(request.prompt_ids)
        self._max_length = self._num_prompt + request.max_new_tokens
        self._eos_ids = eos_ids

    def commit(self, run: Sequence[int], predicted: Mapping[int, int]) -> list[int]:
        """Commit a confirmed run up to the token that ends the response; `predicted` are all the predictions."""
        committed = list(run[: self._max_length - len(self.tokens)])
        end = next((i for i, token in enumerate(committed) if token in self._eos_ids), None)
        if end is not None:
            committed, self.finish_reason = committed[: end + 1], "stop"
        elif len(self.tokens) + len(committed) == self._max_length:
            self.finish_reason = "length"
        self.tokens += committed
        self.accepted.append(len(committed))
        self.state.advance(committed, predicted)
        return committed

    def result(self) -> DecodeResult:
        assert self.finish_reason is not None
        return DecodeResult(tuple(self.tokens[self._num_prompt :]), self.finish_reason, tuple(self.accepted))


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
        state = LookaheadState(self.branches, guesser, request.prompt_ids, pool_text=self.pool_text)
        return _LookaheadRow(request, state, self.eos_ids)

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
        seed = row.state.seed_position
        predicted = self._predict(cache, picker, unread, row.state.inputs(), seed)
        run, place = row.state.confirmed(predicted)
        if len(run) > 1:
            # Where the candidate's tokens would lie had they been fed one by one.
            kept = torch.arange(len(run) - 1, device=self.model.device)
            cache.move(seed + place.start + kept, seed + 1 + kept)
        return row.commit(run, predicted)

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
        read = [t for t in branches.read if t < size]
        read_1P = torch.tensor([read], device=device) + len(unread)
        logits_1PV = masked_logits_BWV(self.model, cache, tokens_1Q, positions_1Q, mask, read_1P)
        picked = picker.pick_BQ(logits_1PV, positions_1Q.gather(1, read_1P) + 1, [0])[0].tolist()
        return dict(zip(read, picked, strict=True))
