"""CUDA graphs of vLLM's model runner V2 for every width that the scheduler may choose, not for the widest alone.

Without them a narrowed step, and with it AR decoding at large batches, would run in pieces between graphs.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from typing import Any

from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager

from cllm.vllm.window import window_widths


class WindowGraphs(ModelCudaGraphManager):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """Plans the graphs of all widths; captures and replays them as vLLM does."""

    decode_query_len: int
    _candidates: dict[Any, list[Any]]
    _capture_descs: dict[Any, list[Any]]

    def _init_candidates(self) -> None:
        plans = [self._plan(width) for width in window_widths(self.decode_query_len)]
        # the first that fits is taken: whole steps before pieces
        self._candidates = _merged(
            (plan._candidates for plan in plans), lambda graph: (graph.uniform_token_count is None, graph.num_tokens)
        )
        self._capture_descs = _merged((plan._capture_descs for plan in plans), lambda graph: -graph.num_tokens)

    def _plan(self, width: int) -> "WindowGraphs":
        """A copy of this manager with vLLM's own plan for steps of one width."""
        plan = copy(self)
        plan.decode_query_len, plan._candidates, plan._capture_descs = width, {}, {}
        super(WindowGraphs, plan)._init_candidates()
        return plan


def _merged(tables: Iterable[Mapping[Any, Sequence[Any]]], order: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    """What any of the tables has under each key, once, in order."""
    found: dict[Any, dict[Any, None]] = {}
    for table in tables:
        for key, graphs in table.items():
            found.setdefault(key, {}).update(dict.fromkeys(graphs))
    return {key: sorted(graphs, key=order) for key, graphs in found.items()}
