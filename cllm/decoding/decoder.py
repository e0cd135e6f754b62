"""Batched Jacobi decoding with a key-value cache; AR decoding is block size 1 of the same loop."""

from collections import deque
from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel

from cllm.decoding.cache import RowCache
from cllm.decoding.config import GuessKind
from cllm.decoding.guess import Guesser
from cllm.decoding.records import Commit, DecodeRequest, DecodeResult, Refill
from cllm.decoding.row import Row
from cllm.decoding.sampling import TokenPicker
from cllm.decoding.step import accepted_B, forward_logits_BWV

_BUSY_SHARE = 0.75  # of a batch


class JacobiDecoder:
    """Decodes a batch of requests, several tokens a forward pass where the model's guesses hold.

    Args:
        model: a causal language model of transformers, in eval mode.
        block_size: n, tokens updated in parallel; 1 is AR decoding.
        refill: block: the window shrinks until its block of n tokens has converged (the paper's algorithm 3, whose
            states are the training trajectories); sliding: the window is always n wide.
        guess: how unknown tokens are guessed.
        eos_ids: tokens that end a response (they are part of it).
        pad_id: fills what is never read, and is the guess of kind "pad".
        record: keep the trajectory of each block (refill "block" only).

    The output of a request does not depend on its batch, the block size or the refill, up to rounding of the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        block_size: int,
        refill: Refill = "sliding",
        guess: GuessKind = "prompt",
        eos_ids: Sequence[int],
        pad_id: int,
        record: bool = False,
    ) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be >= 1, got {block_size}")
        if record and refill != "block":
            raise ValueError("trajectories are recorded with refill 'block' only")
        self.model = model
        self.block_size = block_size
        self.refill: Refill = refill
        self.guess: GuessKind = guess
        self.eos_ids = frozenset(eos_ids)
        self.pad_id = pad_id
        self.record = record

    def generate(self, requests: Sequence[DecodeRequest], batch_size: int | None = None) -> list[DecodeResult]:
        """Decode all requests, `batch_size` at a time (None: all together); results in the order of the requests."""
        rows = self._open_rows(requests)
        for _ in self._run(rows, batch_size or len(rows)):
            pass
        return [row.result() for row in rows]

    def stream(self, requests: Sequence[DecodeRequest]) -> Iterator[list[Commit]]:
        """The same, yielding after every forward pass what it committed (one `Commit` for each unfinished row)."""
        yield from self._run(self._open_rows(requests), len(requests))

    def _open_rows(self, requests: Sequence[DecodeRequest]) -> list[Row]:
        rows = []
        for index, request in enumerate(requests):
            guesser = Guesser(self.guess, request.prompt_ids, self.pad_id, request.sampling.seed)
            rows.append(Row(index, request, guesser, self.block_size, self.refill, self.eos_ids, self.record))
        return rows

    @torch.inference_mode()
    def _run(self, rows: list[Row], batch_size: int) -> Iterator[list[Commit]]:
        """Forward passes until all rows are finished; places that become free are taken by waiting rows.

        Free places ride along until a quarter of the batch is idle, because both dropping and admitting rows copy the
        cache.
        """
        if not rows:
            return
        capacity = max(row.max_length for row in rows) + self.block_size
        picker = TokenPicker([row.request.sampling for row in rows], self.model.device)
        cache = RowCache(self.model.config, capacity)
        waiting, active = deque(rows), list[Row]()
        while waiting or active:
            if waiting and len(active) <= _BUSY_SHARE * batch_size:
                admitted = [waiting.popleft() for _ in range(min(len(waiting), batch_size - len(active)))]
                joining = RowCache(self.model.config, capacity)
                yield self._step(admitted, joining, picker, prefilled=False)
                cache.append(joining)
                active += admitted
            else:
                yield self._step(active, cache, picker, prefilled=True)
            unfinished = [i for i, row in enumerate(active) if row.finish_reason is None]
            if len(unfinished) <= _BUSY_SHARE * len(active):
                active = [active[i] for i in unfinished]
                cache.keep_rows(unfinished, self.model.device)

    def _step(self, rows: list[Row], cache: RowCache, picker: TokenPicker, prefilled: bool) -> list[Commit]:
        """One forward pass for all rows. Their first one also reads the prompts, each with its window behind it."""
        device = self.model.device
        window = max(row.window for row in rows)
        inputs = [row.inputs(window, self.pad_id, with_prompt=not prefilled) for row in rows]
        width = max(map(len, inputs))
        tokens_BQ = torch.tensor([ids + [self.pad_id] * (width - len(ids)) for ids in inputs]).to(device)
        seeds_B1 = torch.tensor([[row.seed_position] for row in rows]).to(device)
        first_B1 = seeds_B1 if prefilled else torch.zeros_like(seeds_B1)
        positions_BQ = first_B1 + torch.arange(width, device=device)
        window_BW = seeds_B1 - first_B1 + torch.arange(window, device=device)
        visible = width + (max(row.seed_position for row in rows) if prefilled else 0)
        logits_BWV = forward_logits_BWV(self.model, cache, tokens_BQ, positions_BQ, window_BW, visible)
        predictions_BW = picker.pick_BQ(logits_BWV, positions_BQ.gather(1, window_BW) + 1, [row.index for row in rows])
        counts = accepted_B(tokens_BQ.gather(1, window_BW)[:, 1:], predictions_BW).tolist()
        return [
            row.advance(tokens, count)
            for row, tokens, count in zip(rows, predictions_BW.tolist(), counts, strict=True)
            if row.finish_reason is None
        ]
