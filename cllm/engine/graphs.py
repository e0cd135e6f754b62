"""CUDA graphs of a runner's work: captured once, replayed with other inputs in the same places.

Shapes: as in `cllm.engine.runner`.
"""

import gc
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from contextlib import contextmanager
from itertools import product
from typing import TYPE_CHECKING, TypeVar

import torch

from cllm.engine.sampler import Logprobs
from cllm.engine.step import Step

if TYPE_CHECKING:
    from cllm.engine.runner import Runner

Result = TypeVar("Result")

# Prompt pieces that one graph reads. In a forward of more tokens the device has more work than the host has launches.
_PROMPT_BATCHES = (1, 2, 4, 8)
_PROMPT_WIDTHS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
_PROMPT_TOKENS = 1024


class StepGraph:
    """A captured step of one batch bucket. Idle rows fill up the batch.

    A greedy step is captured whole. Of a sampled one the model's part is; the sampler, whose work depends on the
    requests, follows eagerly. Graphs share their memory, so all that one leaves behind is its small results: logits for
    the sampler are copied to a place outside.
    """

    def __init__(self, runner: "Runner", step: Step, batch: int, greedy: bool) -> None:
        self.runner = runner
        self.step = step
        self.greedy = greedy
        self.inputs: list[Many[int]] = [step.idle_input] * batch
        self.inputs_BX = runner.state.upload(self.inputs)
        self.num_blocks = runner.state.tables_RM.shape[1]
        predictions = _once_before(self._predict)
        if not greedy:
            self.logits_BPV = runner.shared_logits(predictions[1])
        del predictions
        self.graph, self.captured = _captured(self._whole if greedy else self._model_part, runner)

    def _predict(self) -> tuple[torch.Tensor, torch.Tensor]:
        fed_BP, logits_BPV = self.step.predict(self.inputs_BX, self.num_blocks)
        self.step.finish(self.inputs_BX, fed_BP, logits_BPV, greedy=True)
        return fed_BP, logits_BPV

    def _whole(self) -> torch.Tensor:
        """The step's result."""
        result_BX, _ = self.step.finish(
            self.inputs_BX, *self.step.predict(self.inputs_BX, self.num_blocks), greedy=True
        )
        return result_BX

    def _model_part(self) -> torch.Tensor:
        """The tokens whose predictions are read."""
        fed_BP, logits_BPV = self.step.predict(self.inputs_BX, self.num_blocks)
        self.logits_BPV.copy_(logits_BPV)
        return fed_BP

    def run(self, inputs: Many[Many[int]]) -> tuple[torch.Tensor, Logprobs | None]:
        padded = [*inputs, *[self.step.idle_input] * (len(self.inputs) - len(inputs))]
        if padded != self.inputs:
            self.inputs_BX.copy_(self.runner.state.upload(padded))
            self.inputs = padded
        self.graph.replay()
        if self.greedy:
            return self.captured, None
        return self.step.finish(self.inputs_BX, self.captured, self.logits_BPV, greedy=False)


class PromptGraph:
    """A captured forward that reads prompt pieces of up to `width` tokens. Idle rows fill up the batch."""

    def __init__(self, runner: "Runner", batch: int, width: int) -> None:
        self.runner = runner
        self.batch = batch
        self.rows_2B = runner.state.upload([[runner.state.idle_slot] * batch, [0] * batch])
        slots_B, starts_B = self.rows_2B
        # Of the widest piece's padding some may lie behind the longest table.
        num_blocks = runner.state.tables_RM.shape[1] + -(-width // runner.block_tokens)

        def read() -> None:
            runner.read(slots_B, starts_B, width, num_blocks)

        _once_before(read)
        self.graph, _ = _captured(read, runner)

    def run(self, slots: Many[int], starts: Many[int]) -> None:
        """Read the tokens from `starts` on."""
        idle = self.batch - len(slots)
        rows = [[*slots, *[self.runner.state.idle_slot] * idle], [*starts, *[0] * idle]]
        self.rows_2B.copy_(self.runner.state.upload(rows))
        self.graph.replay()


def _once_before(work: Callable[[], Result]) -> Result:
    """Libraries allocate their workspaces and kernels compile before a capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = work()
    torch.cuda.current_stream().wait_stream(stream)
    return result


def _captured(work: Callable[[], Result], runner: "Runner") -> tuple[torch.cuda.CUDAGraph, Result]:
    """A graph of the work, and what every replay leaves in the same place."""
    graph = torch.cuda.CUDAGraph()
    with _without_collection(), torch.cuda.graph(graph, pool=runner.graph_memory):
        result = work()
    return graph, result


@contextmanager
def _without_collection() -> Iterator[None]:
    """A graph that Python's garbage collector destroys meanwhile, of an engine before this one, would end a capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def bucket(batch: int) -> int:
    """The smallest captured batch that holds `batch` rows: powers of two, then multiples of 8, then of 16."""
    if batch <= 8:
        return 1 << (batch - 1).bit_length()
    step = 8 if batch <= 64 else 16
    return -(-batch // step) * step


def prompt_bucket(batch: int, width: int) -> tuple[int, int] | None:
    """Rows and tokens of a row of the smallest captured forward that reads so many; None: none does."""
    rows = next((size for size in _PROMPT_BATCHES if size >= batch), None)
    tokens = next((size for size in _PROMPT_WIDTHS if size >= width), None)
    if rows is None or tokens is None or rows * tokens > _PROMPT_TOKENS:
        return None
    return rows, tokens


def prompt_buckets(most_rows: int, longest: int) -> list[tuple[int, int]]:
    """All that `prompt_bucket` may give for so many rows and such pieces, those of most tokens first."""
    sizes = {prompt_bucket(rows, width) for rows, width in product(_PROMPT_BATCHES, _PROMPT_WIDTHS)}
    batches = {rows for rows in _PROMPT_BATCHES if rows < 2 * most_rows}
    most = next((width for width in _PROMPT_WIDTHS if width >= longest), _PROMPT_WIDTHS[-1])
    fitting = {size for size in sizes if size is not None and size[0] in batches and size[1] <= most}
    return sorted(fitting, key=lambda size: size[0] * size[1], reverse=True)
