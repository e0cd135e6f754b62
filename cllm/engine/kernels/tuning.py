"""Measure launches as they will run: in a CUDA graph, back to back, on weights that no cache holds."""

import itertools
from collections.abc import Callable, Iterable, Sequence

import torch

_CALLS = 8  # in a graph: enough to hide its start, and what it takes for launches to overlap
_REPLAYS = 5


def enough_weights(weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The weights and copies of them, so that a walk over all finds none in the L2 cache any more."""
    cache = torch.cuda.get_device_properties(weights[0].device).L2_cache_size
    bytes_each = weights[0].nbytes
    needed = -(-3 * cache // bytes_each)
    copies = [weights[0].clone() for _ in range(needed - len(weights))]
    return [*weights[: max(needed, _CALLS)], *copies]


def microseconds(calls: Iterable[Callable[[], object]]) -> float:
    """Of one call on average, the best of several replays of a graph of them; each is called once before, to compile."""
    calls = list(calls)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return min(_replay_ms(graph) for _ in range(_REPLAYS)) * 1000 / len(calls)


def _replay_ms(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
