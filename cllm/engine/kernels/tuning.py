"""Measure launches as they will run: in a CUDA graph, back to back, on weights that no cache holds."""

import itertools
from collections.abc import Callable, Iterable, Sequence

import torch

_CALLS = 16  # in a graph: enough to hide its start, and what it takes for launches to overlap
_REPLAYS = 5


def weights_for_calls(weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """One weight a call of a graph, with copies where a walk over the given ones would find some in the L2 cache."""
    cache = torch.cuda.get_device_properties(weights[0].device).L2_cache_size
    missing = -(-3 * cache // weights[0].nbytes) - len(weights)
    distinct = [*weights, *(weights[0].clone() for _ in range(missing))]
    return list(itertools.islice(itertools.cycle(distinct), max(_CALLS, len(distinct) if missing > 0 else 0)))


def microseconds(calls: Iterable[Callable[[], object]]) -> float:
    """Of one call on average, in the best of several replays of a graph of them all; they are called once before."""
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
