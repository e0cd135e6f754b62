"""Runs the model for the scheduler's plans: on a GPU as CUDA graphs, whose results come back without a wait.

Shapes: B rows (padded to a bucket where graphs are used), W window, X entries of a row's input or result, T = B * W
tokens, P predictions read of a row, V vocabulary, M blocks of a table, E hidden size; of the cache N blocks, S tokens
of a block, K key-value heads, D head size, C = two a layer (keys and values), Z = N * S places.
"""

import time
from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass
from statistics import median

import torch

from cllm.engine.attention import WindowMask, Windows
from cllm.engine.backends import state_for
from cllm.engine.config import EngineConfig
from cllm.engine.graphs import PromptGraph, StepGraph, bucket, prompt_bucket, prompt_buckets
from cllm.engine.model import DecoderModel
from cllm.engine.ops import Pages
from cllm.engine.sampler import Logprobs, Sampler
from cllm.engine.scheduler import Chunk
from cllm.engine.sequence import Sequence
from cllm.engine.state import Places
from cllm.engine.step import Launched, Step

_GROUP_TOKENS = 8192  # of one forward that reads prompts
_CHUNK_STEP = 16  # widths of such a forward are multiples of it


@dataclass(frozen=True, slots=True)
class Move:
    """`count` tokens of a row, the first one at `source`, go to `target` and behind."""

    row: Sequence
    source: int
    target: int
    count: int


class Runner:
    """Owns what is on the device: cache pages, row state, graphs.

    Args:
        sampler: draws tokens from logits where a request is not plainly greedy.
        num_blocks: blocks of the cache, the null block included.
        fill_id: token for places that nobody reads.
    """

    def __init__(
        self, model: DecoderModel, sampler: Sampler, config: EngineConfig, *, num_blocks: int, fill_id: int
    ) -> None:
        self.model = model
        self.sampler = sampler
        self.device = model.device
        self.block_tokens = config.block_tokens
        self.num_blocks = num_blocks
        self._longest_chunk = min(config.prefill_tokens, config.max_tokens)
        self._most_logits = bucket(config.max_rows) * config.width * model.shape.vocab_size
        self.state = state_for(self.device)(
            num_rows=config.max_rows,
            max_tokens=config.max_tokens,
            margin=config.width,
            block_tokens=config.block_tokens,
            fill_id=fill_id,
            device=self.device,
        )
        layers, heads = model.shape.num_layers, model.heads
        store = torch.zeros(
            layers, 2, num_blocks, config.block_tokens, heads.num_kv, heads.size, dtype=model.dtype, device=self.device
        )
        self.cache = [Pages(keys_NSKD, values_NSKD) for keys_NSKD, values_NSKD in store]
        self._store_CZKD = store.flatten(2, 3).flatten(0, 1)
        self._graphs: dict[tuple[Step, int, bool], StepGraph] = {}
        self._prompt_graphs: dict[tuple[int, int], PromptGraph] = {}
        self._use_graphs = self.device.type == "cuda" and config.cuda_graphs
        self.graph_memory = torch.cuda.graph_pool_handle() if self._use_graphs else None
        self._logits: torch.Tensor | None = None

    @torch.inference_mode()
    def store(self, chunks: Many[Chunk]) -> None:
        """Read prompt pieces into the cache."""
        for width, group in _groups_of_similar_length(chunks):
            slots, starts = [chunk.sequence.place for chunk in group], [chunk.start for chunk in group]
            size = prompt_bucket(len(group), width) if self._use_graphs else None
            if size is not None:
                self._prompt_graph(*size).run(slots, starts)
            else:
                num_blocks = self._blocks_until(max(starts) + width)
                self.read(self.state.upload(slots), self.state.upload(starts), width, num_blocks)

    def read(self, slots_B: torch.Tensor, starts_B: torch.Tensor, width: int, num_blocks: int) -> None:
        """Read `width` tokens of each row's buffer into the cache; `num_blocks` as in `DeviceState.places`."""
        places = self.state.places(slots_B, starts_B, width, num_blocks)
        self.hidden_TE(self.state.tokens_at(slots_B, places.positions_BW), places)

    @torch.inference_mode()
    def launch(self, step: Step, rows: Many[Sequence], inputs: Many[Many[int]], *, alone: bool = True) -> Launched:
        """Launch a step of these rows with an input for each; the host need not wait for it.

        Args:
            alone: nothing else was launched since the step before.
        """
        work = self.sampler.work(row.place for row in rows)
        greedy = work == "greedy"
        if self._use_graphs:
            result_BX, logprobs = self._graph(step, len(rows), greedy).run(inputs)
        else:
            end = max(len(row.tokens) + row.num_in_flight for row in rows) + step.width
            result_BX, logprobs = _run(step, self.state.upload(inputs), self._blocks_until(end), greedy=greedy)
        result_BX, logprobs, event = self._send(result_BX, logprobs)
        launched_for = tuple((row, row.admissions) for row in rows)
        return Launched(launched_for, step.width, result_BX, logprobs, event, work, alone)

    @torch.inference_mode()
    def move(self, moves: Many[Move]) -> None:
        """Copy keys and values within rows, in all layers at once; what is written by one move none of them reads."""
        pairs = [
            (self._place(move.row, move.source + i), self._place(move.row, move.target + i))
            for move in moves
            for i in range(move.count)
        ]
        sources_X, targets_X = self.state.upload(pairs).unbind(1)
        self._store_CZKD.index_copy_(1, targets_X, self._store_CZKD.index_select(1, sources_X))

    @torch.inference_mode()
    def capture(self, steps: Many[Step]) -> None:
        """Capture the graphs that read prompts and those of these steps for all batches, greedy and sampled, so that no
        request waits for one.

        The largest come first: memory that they need is enough for the others.
        """
        if self._use_graphs:
            for size in prompt_buckets(self.state.idle_slot, self._longest_chunk):
                self._prompt_graph(*size)
            for batch in sorted({bucket(rows) for rows in range(1, self.state.idle_slot + 1)}, reverse=True):
                for step in sorted(steps, key=lambda step: step.width, reverse=True):
                    self._graph(step, batch, greedy=True)
                    self._graph(step, batch, greedy=False)

    @torch.inference_mode()
    def time(self, step: Step, inputs: Many[Many[int]], end: int, *, greedy: bool, repeats: int = 5) -> float:
        """Median milliseconds of a step whose rows end before position `end`.

        It also captures the step's graph, so that the first request does not wait for it.
        """
        inputs_BX, num_blocks = self.state.upload(inputs), self._blocks_until(end)
        times = []
        for _ in range(repeats + 1):
            self.synchronise()
            start = time.perf_counter()
            if self._use_graphs:
                self._graph(step, len(inputs), greedy).run(inputs)
            else:
                _run(step, inputs_BX, num_blocks, greedy=greedy)
            self.synchronise()
            times.append(time.perf_counter() - start)
        return 1000 * median(times[1:])

    def shared_logits(self, like_BPV: torch.Tensor) -> torch.Tensor:
        """Memory for logits like these. All sampled steps share it: each is drawn from before the next one runs."""
        if self._logits is None:
            self._logits = torch.empty(self._most_logits, dtype=like_BPV.dtype, device=self.device)
        return self._logits[: like_BPV.numel()].view(like_BPV.shape)

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def hidden_TE(
        self,
        tokens_BW: torch.Tensor,
        places: Places,
        *,
        positions_BW: torch.Tensor | None = None,
        mask: WindowMask | None = None,
    ) -> torch.Tensor:
        """Final hidden states of windows; their keys and values are in the cache then, one behind the other.

        Args:
            positions_BW: int64 of each token, if they do not follow each other.
            mask: as in `Windows`.
        """
        if positions_BW is None:
            positions_BW = places.positions_BW
        windows = Windows(places.starts_B, places.tables_BM, tokens_BW.shape[1], mask)
        return self.model.hidden_TE(
            tokens_BW.flatten(), positions_BW.flatten(), places.stored_BW.flatten(), windows, self.cache
        )

    def _place(self, row: Sequence, index: int) -> int:
        """Where the cache has a row's token."""
        return row.blocks[index // self.block_tokens] * self.block_tokens + index % self.block_tokens

    def _blocks_until(self, end: int) -> int:
        return -(-end // self.block_tokens)

    def _send(
        self, result_BX: torch.Tensor, logprobs: Logprobs | None
    ) -> "tuple[torch.Tensor, Logprobs | None, torch.cuda.Event | None]":
        """Results on their way to the host, and the event that says they are there."""
        if self.device.type != "cuda":
            return result_BX, logprobs, None
        if logprobs is not None:
            logprobs = Logprobs(*map(_to_host, (logprobs.chosen_BW, logprobs.top_BWK, logprobs.top_ids_BWK)))
        host_BX = _to_host(result_BX)
        event = torch.cuda.Event()
        event.record()
        return host_BX, logprobs, event

    def _graph(self, step: Step, batch: int, greedy: bool) -> StepGraph:
        key = (step, bucket(batch), greedy)
        if key not in self._graphs:
            self._graphs[key] = StepGraph(self, *key)
        return self._graphs[key]

    def _prompt_graph(self, batch: int, width: int) -> PromptGraph:
        if (batch, width) not in self._prompt_graphs:
            self._prompt_graphs[batch, width] = PromptGraph(self, batch, width)
        return self._prompt_graphs[batch, width]


def _run(step: Step, inputs_BX: torch.Tensor, num_blocks: int, *, greedy: bool) -> tuple[torch.Tensor, Logprobs | None]:
    return step.finish(inputs_BX, *step.predict(inputs_BX, num_blocks), greedy=greedy)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory, there once the events recorded after it have happened."""
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def _groups_of_similar_length(chunks: Many[Chunk]) -> Iterator[tuple[int, list[Chunk]]]:
    """Chunks that one forward reads, at most half of it padding, each group with its width."""
    ordered = sorted(chunks, key=lambda chunk: chunk.count, reverse=True)
    while ordered:
        width = -(-ordered[0].count // _CHUNK_STEP) * _CHUNK_STEP
        most = max(1, _GROUP_TOKENS // width)
        group = [chunk for chunk in ordered[:most] if chunk.count > width // 2 or width <= 4 * _CHUNK_STEP]
        yield width, group
        ordered = ordered[len(group) :]
