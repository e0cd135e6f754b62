"""Windows of Jacobi decoding inside vLLM. No tensors, no vLLM."""

from cllm.engine.costs import CostTable
from cllm.engine.policy import AdaptiveWindow, FixedWindow, WindowPolicy


def window_widths(window: int) -> tuple[int, ...]:
    """The windows that a step may take, increasing: `window`, a half and a quarter of it, and 1, which is AR decoding.

    Few, for every one of them has its own CUDA graphs.
    """
    return tuple(sorted({1, max(1, window // 4), max(1, window // 2), window}))


def make_policy(window: int, costs: CostTable | None) -> WindowPolicy:
    """What chooses every step's window: by measured step times, or without them always the widest."""
    if costs is None or window == 1:
        return FixedWindow(window)
    return AdaptiveWindow(costs, costs.widths)
