"""Runs the model for the scheduler's plans. The only file that knows CUDA graphs, pinned memory and events.

Shapes: B rows (padded to a bucket where graphs are used), W window, T = B * W tokens, M blocks of a table,
E hidden size, V vocabulary.
"""

import time
from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass
from statistics import median

import torch

from cllm.engine.attention import Windows
from cllm.engine.config import EngineConfig
from cllm.engine.model import DecoderModel
from cllm.engine.ops import Pages
from cllm.engine.sampler import Logprobs, Sampler
from cllm.engine.scheduler import Chunk
from cllm.engine.sequence import Sequence
from cllm.engine.state import DeviceState

_GROUP_TOKENS = 8192  # of one forward that reads prompts
_CHUNK_STEP = 16  # widths of such a forward are multiples of it


@dataclass(frozen=True, slots=True)
class Launched:
    """A step on its way to the host: `read` waits for it.

    Attributes:
        rows: the sequences, each with the admission that the step was launched for.
        result_BX: host memory that will hold each row's number of committed tokens, then its W predictions.
        logprobs: of the predictions, where a row asks for them; on the host as well.
    """

    rows: tuple[tuple[Sequence, int], ...]
    width: int
    result_BX: torch.Tensor
    logprobs: Logprobs | None
    event: "torch.cuda.Event | None"

    def read(self) -> list[list[int]]:
        """For each row its number of committed tokens, then its predictions. `logprobs` are there then, too."""
        if self.event is not None:
            self.event.synchronize()
        return self.result_BX[: len(self.rows)].tolist()


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
        self.state = DeviceState(
            num_rows=config.max_rows,
            max_tokens=config.max_tokens,
            margin=config.window,
            block_tokens=config.block_tokens,
            fill_id=fill_id,
            device=self.device,
        )
        self.cache = [self._pages(num_blocks) for _ in range(model.shape.num_layers)]
        self._graphs: dict[tuple[int, int, bool], _StepGraph] = {}
        self._use_graphs = self.device.type == "cuda" and config.cuda_graphs
        self._memory = torch.cuda.graph_pool_handle() if self._use_graphs else None

    @torch.inference_mode()
    def store(self, chunks: Many[Chunk]) -> None:
        """Read prompt pieces into the cache."""
        for width, group in _groups_of_similar_length(chunks):
            slots_B = self.state.upload([chunk.sequence.place for chunk in group])
            starts_B = self.state.upload([chunk.start for chunk in group])
            tokens_BW = self.state.tokens_at(slots_B, self.state.positions(starts_B, width))
            end = max(chunk.start for chunk in group) + width
            self._hidden_TE(slots_B, tokens_BW, starts_B, self._blocks_until(end))

    @torch.inference_mode()
    def decode(self, rows: Many[Sequence], width: int) -> Launched:
        """Launch one step of windows of `width` tokens; the host need not wait for it."""
        slots = [row.place for row in rows]
        greedy = self.sampler.is_greedy(slots)
        if self._use_graphs:
            result_BX, logprobs = self._graph(len(slots), width, greedy).run(slots)
        else:
            end = max(len(row.tokens) + row.num_in_flight for row in rows) + width
            result_BX, logprobs = self._step(self.state.upload(slots), width, self._blocks_until(end), greedy)
        return self._send(result_BX, logprobs, rows, width)

    @torch.inference_mode()
    def capture(self, widths: Many[int]) -> None:
        """Capture the greedy step's graphs for all batches now, so that no request waits for it."""
        if self._use_graphs:
            for batch in sorted({bucket(rows) for rows in range(1, self.state.idle_slot + 1)}, reverse=True):
                for width in widths:
                    self._graph(batch, width, greedy=True)

    @torch.inference_mode()
    def time_step(self, batch: int, width: int, context: int, repeats: int = 5) -> float:
        """Median milliseconds of a greedy step of `batch` rows that have `context` tokens each; no row changes.

        It also captures the step's graph, so that the first request does not wait for it.
        """
        state = self.state
        idle = state.idle_slot
        state.length_R[idle] = state.limit_R[idle] = context  # full, so that it commits nothing
        slots_B, num_blocks = state.upload([idle] * batch), self._blocks_until(context + width)
        times = []
        for _ in range(repeats + 1):
            self.synchronise()
            start = time.perf_counter()
            if self._use_graphs:
                self._graph(batch, width, greedy=True).run([idle] * batch)
            else:
                self._step(slots_B, width, num_blocks, greedy=True)
            self.synchronise()
            times.append(time.perf_counter() - start)
        state.length_R[idle] = state.limit_R[idle] = 1
        return 1000 * median(times[1:])

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _pages(self, num_blocks: int) -> Pages:
        heads = self.model.heads
        shape = (num_blocks, self.block_tokens, heads.num_kv, heads.size)
        return Pages(*(torch.zeros(shape, dtype=self.model.dtype, device=self.device) for _ in range(2)))

    def _blocks_until(self, end: int) -> int:
        return min(-(-end // self.block_tokens), self.state.tables_RM.shape[1])

    def _hidden_TE(
        self, slots_B: torch.Tensor, tokens_BW: torch.Tensor, starts_B: torch.Tensor, num_blocks: int
    ) -> torch.Tensor:
        """Final hidden states of windows; their keys and values are in the cache then."""
        positions_BW = self.state.positions(starts_B, tokens_BW.shape[1])
        tables_BM = self.state.tables_RM[slots_B, :num_blocks]
        index_BW = (positions_BW // self.block_tokens).clamp_max(num_blocks - 1)
        places_BW = tables_BM.gather(1, index_BW).long() * self.block_tokens + positions_BW % self.block_tokens
        windows = Windows(starts_B.int(), tables_BM, tokens_BW.shape[1])
        return self.model.hidden_TE(
            tokens_BW.flatten(), positions_BW.flatten(), places_BW.flatten(), windows, self.cache
        )

    def _step(
        self, slots_B: torch.Tensor, width: int, num_blocks: int, greedy: bool
    ) -> tuple[torch.Tensor, Logprobs | None]:
        """One whole step; what it gives is as in `Launched`."""
        window_BW, logits_BWV = self._predict(slots_B, width, num_blocks)
        if greedy:
            return self._finish_greedy(slots_B, window_BW, logits_BWV), None
        return self._finish_sampled(slots_B, window_BW, logits_BWV)

    def _predict(self, slots_B: torch.Tensor, width: int, num_blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
        window_BW, starts_B = self.state.window(slots_B, width)
        hidden_TE = self._hidden_TE(slots_B, window_BW, starts_B, num_blocks)
        return window_BW, self.model.logits_RV(hidden_TE).unflatten(0, window_BW.shape)

    def _finish_greedy(self, slots_B: torch.Tensor, window_BW: torch.Tensor, logits_BWV: torch.Tensor) -> torch.Tensor:
        predictions_BW = logits_BWV.argmax(-1)
        counts_B = self.state.accept(slots_B, window_BW, predictions_BW)
        return torch.cat([counts_B[:, None], predictions_BW], dim=1)

    def _finish_sampled(
        self, slots_B: torch.Tensor, window_BW: torch.Tensor, logits_BWV: torch.Tensor
    ) -> tuple[torch.Tensor, Logprobs | None]:
        positions_BW = self.state.positions(self.state.length_R[slots_B], window_BW.shape[1])
        predictions_BW = self.sampler.pick_BW(logits_BWV, window_BW, positions_BW, slots_B)
        counts_B = self.state.accept(slots_B, window_BW, predictions_BW)
        self.sampler.commit(slots_B, predictions_BW, counts_B)
        logprobs = self.sampler.logprobs(logits_BWV, predictions_BW)
        return torch.cat([counts_B[:, None], predictions_BW], dim=1), logprobs

    def _send(self, result_BX: torch.Tensor, logprobs: Logprobs | None, rows: Many[Sequence], width: int) -> Launched:
        launched_for = tuple((row, row.admissions) for row in rows)
        if self.device.type != "cuda":
            return Launched(launched_for, width, result_BX, logprobs, None)
        if logprobs is not None:
            logprobs = Logprobs(*map(_to_host, (logprobs.chosen_BW, logprobs.top_BWK, logprobs.top_ids_BWK)))
        host_BX = _to_host(result_BX)
        event = torch.cuda.Event()
        event.record()
        return Launched(launched_for, width, host_BX, logprobs, event)

    def _graph(self, batch: int, width: int, greedy: bool) -> "_StepGraph":
        key = (bucket(batch), width, greedy)
        if key not in self._graphs:
            self._graphs[key] = _StepGraph(self, *key)
        return self._graphs[key]


class _StepGraph:
    """A captured step of one batch bucket and window. Idle slots fill up the batch.

    A greedy step is captured whole. Of a sampled one the model's part is; the sampler, whose work depends on the
    requests, follows eagerly.
    """

    def __init__(self, runner: Runner, batch: int, width: int, greedy: bool) -> None:
        self.runner = runner
        self.greedy = greedy
        state = runner.state
        self.slots = [state.idle_slot] * batch
        self.slots_B = state.upload(self.slots)
        num_blocks = state.tables_RM.shape[1]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries allocate their workspaces and kernels compile before the capture
            runner._step(self.slots_B, width, num_blocks, greedy=True)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=runner._memory):
            window_BW, logits_BWV = runner._predict(self.slots_B, width, num_blocks)
            self.outputs = (
                (runner._finish_greedy(self.slots_B, window_BW, logits_BWV),) if greedy else (window_BW, logits_BWV)
            )

    def run(self, slots: list[int]) -> tuple[torch.Tensor, Logprobs | None]:
        padded = slots + [self.runner.state.idle_slot] * (len(self.slots) - len(slots))
        if padded != self.slots:
            self.slots_B.copy_(self.runner.state.upload(padded))
            self.slots = padded
        self.graph.replay()
        if self.greedy:
            return self.outputs[0], None
        return self.runner._finish_sampled(self.slots_B, *self.outputs)


def bucket(batch: int) -> int:
    """The smallest captured batch that holds `batch` rows: powers of two, then multiples of 8, then of 16."""
    if batch <= 8:
        return 1 << (batch - 1).bit_length()
    step = 8 if batch <= 64 else 16
    return -(-batch // step) * step


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
