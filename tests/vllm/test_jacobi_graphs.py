"""Which CUDA graph a step of Jacobi decoding inside vLLM gets. The plan is made without a GPU; the graphs are not."""

import inspect
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: pip install -e .[cpu]")

from vllm.config.compilation import CUDAGraphMode

from cllm.vllm.jacobi_graphs import WindowGraphs
from cllm.vllm.window import window_widths

WINDOW, MAX_ROWS = 16, 128


@pytest.fixture(scope="module")
def graphs() -> Any:
    """A manager with its plan and no device: what the constructor would set, as far as the plan reads it."""
    manager = object.__new__(WindowGraphs)
    sizes = [1, 2, 4, *range(8, 513, 8)]
    manager.compilation_config = SimpleNamespace(cudagraph_capture_sizes=sizes, max_cudagraph_capture_size=512)
    manager.vllm_config = SimpleNamespace(speculative_config=None, num_speculative_tokens=WINDOW - 1)
    manager.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    manager.decode_query_len, manager.max_num_reqs = WINDOW, MAX_ROWS
    manager.lora_capture_cases, manager._lora_dispatch_map = [0], {}
    manager.varlen_decode = manager.use_breakable_cg = False
    manager._candidates, manager._capture_descs = {}, {}
    manager._init_candidates()
    manager._graphs_captured = True
    return manager


def dispatch(graphs: Any, rows: int, tokens: int, width: int | None) -> Any:
    more = (
        {"max_query_len": width or tokens} if "max_query_len" in inspect.signature(graphs.dispatch).parameters else {}
    )
    return graphs.dispatch(rows, tokens, width, 0, **more)


@pytest.mark.parametrize("width", window_widths(WINDOW))
@pytest.mark.parametrize("rows", [1, 3, 8, 31, 32])
def test_every_width_replays_a_whole_step(graphs: Any, width: int, rows: int) -> None:
    graph = dispatch(graphs, rows, rows * width, width)
    assert graph.cg_mode == CUDAGraphMode.FULL
    assert graph.uniform_token_count == width
    assert rows * width <= graph.num_tokens <= rows * width + 8 * width
    assert graph.num_reqs * width == graph.num_tokens


def test_ar_at_the_largest_batch_replays_a_whole_step(graphs: Any) -> None:
    graph = dispatch(graphs, MAX_ROWS, MAX_ROWS, 1)
    assert (graph.cg_mode, graph.num_tokens) == (CUDAGraphMode.FULL, MAX_ROWS)


def test_rows_of_several_widths_and_prompts_run_in_pieces(graphs: Any) -> None:
    assert dispatch(graphs, 3, 40, None).cg_mode == CUDAGraphMode.PIECEWISE
    assert dispatch(graphs, 3, 3 * 7, 7).cg_mode == CUDAGraphMode.PIECEWISE


def test_every_planned_graph_is_captured_once(graphs: Any) -> None:
    planned = {graph for candidates in graphs._candidates.values() for graph in candidates}
    captured = [graph for captures in graphs._capture_descs.values() for graph in captures]
    assert planned == set(captured)
    assert len(captured) == len(set(captured))
    assert graphs.decode_query_len == WINDOW
