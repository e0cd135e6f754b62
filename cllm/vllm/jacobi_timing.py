"""Step times of every window, measured in vLLM's worker once it is warm, and their way to the scheduler.

The scheduler is built after the workers are warm, perhaps in another process, and vLLM passes nothing but compile times
back. So the table travels in a file of the machine's folder for temporary files, named after the engine.

Shapes: F tokens of a step, V vocabulary.
"""

import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cllm.engine.costs import CostTable
from cllm.errors import InputError

_WARM_STEPS, _TIMED_STEPS = 2, 8


def time_steps(runner: Any, widths: Sequence[int], max_rows: int, max_tokens: int) -> CostTable:
    """Milliseconds of steps of vLLM's model runner V2, for powers of two of rows.

    The steps follow one another without a wait, as they do with asynchronous scheduling: where the host is slower than
    the device, its time is the step's.

    Args:
        widths: windows, increasing.
        max_rows: rows of a step at most.
        max_tokens: tokens of a step at most; a batch that would exceed it is left out, as it is never scheduled.
    """
    most = max(1, min(max_rows, max_tokens // widths[-1]))
    batches = sorted({min(1 << i, most) for i in range(most.bit_length() + 1)})
    return CostTable.measure(lambda batch, width: _time_step(runner, batch, width), batches, widths)


def publish(config: Any, costs: CostTable) -> None:
    """Leave the table to the scheduler of the same engine."""
    document = {"batches": costs.batches, "widths": costs.widths, "milliseconds": costs.milliseconds.tolist()}
    path = _path(config)
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps(document))
    draft.replace(path)


def receive(config: Any) -> CostTable:
    """The table that this engine's worker left; it is taken away.

    Raises:
        InputError: there is none.
    """
    path = _path(config)
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(
            f"additional_config.jacobi.policy: the worker's step times are not in {path.parent}, which it must share "
            'with the scheduler; or set "policy": "fixed"'
        ) from None
    path.unlink()
    return CostTable(document["batches"], document["widths"], document["milliseconds"])


def _path(config: Any) -> Path:
    name = f"cllm-jacobi-{config.instance_id}-{config.parallel_config.data_parallel_rank}.json"
    return Path(tempfile.gettempdir()) / name


def _time_step(runner: Any, batch: int, width: int) -> float:
    for _ in range(_WARM_STEPS):
        _run_step(runner, batch, width)
    _synchronise(runner.device)
    start = time.perf_counter()
    for _ in range(_TIMED_STEPS):
        _run_step(runner, batch, width)
    _synchronise(runner.device)
    return 1000 * (time.perf_counter() - start) / _TIMED_STEPS


@torch.inference_mode()
def _run_step(runner: Any, batch: int, width: int) -> None:
    """A step as vLLM's own dummy runs make one, but `width` tokens wide, and with the logits of all its places."""
    from vllm.v1.core.sched.output import SchedulerOutput

    step = SchedulerOutput.make_empty()
    step.num_scheduled_tokens = {f"timed-{row}": width for row in range(batch)}
    step.total_num_scheduled_tokens = batch * width
    runner.kv_connector.set_disabled(True)
    try:
        runner.execute_model(step, dummy_run=True)
    finally:
        runner.kv_connector.set_disabled(False)
    state, runner.execute_model_state = runner.execute_model_state, None
    logits_FV = runner.model.compute_logits(state.hidden_states[: batch * width])
    if logits_FV is not None:  # of the ranks, those that sample
        logits_FV.argmax(-1)  # drawing a token reads every logit as well


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
