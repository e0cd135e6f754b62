"""Windows of Jacobi decoding inside vLLM, by batch size. No tensors, no vLLM."""

from collections.abc import Sequence

from cllm.engine.policy import AdaptiveWindow, CostTable, FixedWindow, WindowPolicy
from cllm.vllm.config import JacobiOptions

_GUESS_COST = 0.002  # of a step, for each guess: sampling and attention of a wider query


def window_widths(window: int) -> tuple[int, ...]:
    """The windows that a step may take, increasing: `window`, a half and a quarter of it, and 1, which is AR decoding.

    Few, for every one of them has its own CUDA graphs.
    """
    return tuple(sorted({1, max(1, window // 4), max(1, window // 2), window}))


def estimated_costs(widths: Sequence[int], max_rows: int, free_tokens: int) -> CostTable:
    """Step times relative to AR of one row: reading the weights hides the first `free_tokens` tokens of a step, beyond
    them time grows in proportion.
    """
    batches = sorted({*(2**i for i in range(max_rows.bit_length())), max_rows})

    def cost(batch: int, n: int) -> float:
        return max(1.0, batch * n / free_tokens) + _GUESS_COST * (n - 1)

    return CostTable(batches, widths, [[cost(batch, n) for n in widths] for batch in batches])


def make_policy(options: JacobiOptions, window: int, max_rows: int) -> WindowPolicy:
    """The policy that chooses every step's window."""
    if options.policy == "fixed" or window == 1:
        return FixedWindow(window)
    widths = window_widths(window)
    return AdaptiveWindow(estimated_costs(widths, max_rows, options.free_tokens), widths)
