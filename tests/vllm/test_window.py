"""The window that Jacobi decoding inside vLLM takes, by batch and acceptance. Needs no vLLM."""

import pytest

from cllm.engine.policy import WindowPolicy
from cllm.vllm.config import JacobiOptions
from cllm.vllm.window import estimated_costs, make_policy, window_widths


def settle(policy: WindowPolicy, rows: int, accepts: int, steps: int = 400) -> list[int]:
    """Windows of the last steps, when every row commits up to `accepts` tokens a step."""
    keys = [f"row-{i}" for i in range(rows)]
    taken = []
    for _ in range(steps):
        n = policy.choose(keys)
        taken.append(n)
        for key in keys:
            policy.observe(key, n, min(accepts, n))
    return taken[-100:]


def adaptive(max_rows: int = 128) -> WindowPolicy:
    return make_policy(JacobiOptions(), 16, max_rows)


def test_widths_are_few_and_hold_ar() -> None:
    assert window_widths(16) == (1, 4, 8, 16)
    assert window_widths(2) == (1, 2)
    assert window_widths(1) == (1,)


def test_costs_grow_with_batch_and_width_beyond_what_is_free() -> None:
    costs = estimated_costs((1, 4, 16), 100, 200)
    assert costs.batches == (1, 2, 4, 8, 16, 32, 64, 100)
    assert costs.cost(1, 16) < 1.05
    assert costs.cost(100, 16) == pytest.approx(8, rel=0.01)


def test_a_model_that_accepts_much_gets_a_wide_window_alone_and_a_narrow_one_in_a_crowd() -> None:
    assert min(settle(adaptive(), rows=1, accepts=4)) >= 8
    crowd = settle(adaptive(), rows=128, accepts=4)
    assert max(set(crowd), key=crowd.count) <= 4


def test_a_model_that_accepts_nothing_decodes_by_ar() -> None:
    taken = settle(adaptive(), rows=32, accepts=1)
    assert taken.count(1) > 0.8 * len(taken)


def test_fixed_takes_the_whole_window() -> None:
    assert set(settle(make_policy(JacobiOptions(policy="fixed"), 16, 128), rows=128, accepts=1)) == {16}
