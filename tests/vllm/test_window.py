"""The window that Jacobi decoding inside vLLM takes, by step times, batch and acceptance. Needs no vLLM."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from cllm.engine.costs import CostTable
from cllm.engine.policy import FixedWindow, WindowPolicy
from cllm.errors import InputError
from cllm.vllm.jacobi_timing import publish, receive
from cllm.vllm.window import make_policy, window_widths

# Milliseconds of steps of Llama-2-7B inside vLLM 0.26 on an H200, as far as they were measured (1 row, n = 1 and 16; 8
# and 32 rows likewise); the rest lies between.
BATCHES, WIDTHS = (1, 8, 32), (1, 4, 8, 16)
MEASURED = CostTable(BATCHES, WIDTHS, [[4.45, 4.46, 4.47, 4.50], [4.94, 5.05, 5.20, 5.37], [6.29, 7.5, 10.0, 16.3]])


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


def test_widths_are_few_and_hold_ar() -> None:
    assert window_widths(16) == (1, 4, 8, 16)
    assert window_widths(2) == (1, 2)
    assert window_widths(1) == (1,)


@pytest.mark.parametrize(("rows", "accepts"), [(1, 1), (1, 4), (8, 1), (8, 3), (32, 1), (32, 2), (32, 4), (32, 16)])
def test_it_is_never_slower_than_ar_and_close_to_the_best(rows: int, accepts: int) -> None:
    """Rows that commit `accepts` tokens where the window allows it; the best window is known by the arithmetic."""
    speeds = {n: min(accepts, n) / MEASURED.cost(rows, n) for n in WIDTHS}
    taken = settle(make_policy(16, MEASURED), rows, accepts)
    kept = max(set(taken), key=taken.count)
    assert speeds[kept] >= 0.8 * max(speeds.values())
    mean = sum(min(accepts, n) for n in taken) / sum(MEASURED.cost(rows, n) for n in taken)
    assert mean >= 0.97 * speeds[1]


def test_steps_that_grow_dearer_make_the_window_narrower() -> None:
    slow = CostTable(BATCHES, WIDTHS, [[1, 4, 8, 16]] * 3)  # a machine where every token takes its time
    assert max(settle(make_policy(16, slow), rows=1, accepts=3)) < 16
    assert set(settle(make_policy(16, MEASURED), rows=1, accepts=8)) & {8, 16}


def test_without_step_times_the_window_is_fixed() -> None:
    policy = make_policy(16, None)
    assert isinstance(policy, FixedWindow)
    assert set(settle(policy, rows=128, accepts=1)) == {16}


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the table's way needs to know of an engine."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return SimpleNamespace(instance_id="abcde", parallel_config=SimpleNamespace(data_parallel_rank=0))


def test_the_table_reaches_the_scheduler_once_and_whole(engine: SimpleNamespace, tmp_path: Path) -> None:
    publish(engine, MEASURED)
    other = SimpleNamespace(instance_id="other", parallel_config=engine.parallel_config)
    with pytest.raises(InputError, match="step times are not in"):
        receive(other)
    found = receive(engine)
    assert (found.batches, found.widths) == (BATCHES, WIDTHS)
    assert json.dumps(found.milliseconds.tolist()) == json.dumps(MEASURED.milliseconds.tolist())
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match='"policy": "fixed"'):
        receive(engine)
