"""Cells of the benchmark on Ray: workers on devices of their own, each with one cell after the other.

A worker that fails, dies or takes too long is ended with all processes that it started, and its cell is tried once more
by a fresh one.
"""

import os
import signal
import sys
import time
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cllm.bench.matrix import Cell, MatrixRecipe, Platform, RunKey
from cllm.bench.measure import Workbench
from cllm.bench.methods import gpus_of
from cllm.bench.prompts import Run
from cllm.bench.result import CellRecord, CellResult
from cllm.errors import InputError
from cllm.provenance import collect_provenance
from jobs.errors import input_error_in
from jobs.pool import exclusive, exclusive_places

MAX_ATTEMPTS = 2
CLOSE_SECONDS = 60.0  # for a worker to give its memory back
MARK = "CLLM_CELL_WORKER"  # environment variable by which a worker's children are known


def capacity(matrix: MatrixRecipe) -> float:
    """How much of what cells take there is: GPUs; or machines, for timed cells on CPUs; or CPU cores, for others."""
    if matrix.gpus or matrix.load.timed:
        return exclusive_places(matrix.gpus)
    return ray.cluster_resources().get("CPU", 0)


def cost(cell: Cell, matrix: MatrixRecipe) -> float:
    """How much of it a cell takes."""
    if matrix.gpus:
        return gpus_of(cell.method) if matrix.load.timed else matrix.gpu_share
    return 1 if matrix.load.timed else matrix.threads


def resources(cell: Cell, matrix: MatrixRecipe) -> dict[str, float]:
    """The options of a cell's worker. One that is timed shares nothing."""
    if matrix.gpus:
        return {"num_gpus": cost(cell, matrix)}
    return exclusive(0) if matrix.load.timed else {"num_cpus": matrix.threads}


def set_threads(matrix: MatrixRecipe) -> None:
    """Of this process, where cells run on the CPU."""
    if not matrix.gpus:
        torch.set_num_threads(matrix.threads)


@ray.remote
class CellWorker:
    """Measures the cells of one model.

    Args:
        mark: names the worker to the processes that it starts.
    """

    def __init__(self, matrix: MatrixRecipe, command: Sequence[str], mark: str) -> None:
        os.environ[MARK] = mark  # children inherit it
        set_threads(matrix)
        self.command = command
        self.workbench = Workbench()

    def node(self) -> str:
        """Where it runs, once it does."""
        return ray.get_runtime_context().get_node_id()

    def measure(self, cell: Cell, run: Run) -> tuple[CellResult, dict[str, Any]]:
        """The result, and where it is from.

        Raises:
            InputError: this machine is another one than the plan was made for, or the model cannot be used so.
        """
        here = Platform.here().for_engine(cell.engine)
        if here != cell.platform:
            raise InputError(f"planned for {cell.platform}, this machine is {here}: measure each kind by itself")
        return self.workbench.measure(cell, run), collect_provenance(self.command)

    def close(self) -> None:
        """Give all memory back: vLLM's processes would outlive the worker and keep the GPU."""
        self.workbench.close()


def kill_marked(mark: str) -> int:
    """Kill what a worker of that mark has started on this machine and left behind; how many processes that were."""
    ended = 0
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # gone, or somebody else's
            if f"{MARK}={mark}".encode() in (process / "environ").read_bytes().split(b"\0"):
                os.kill(int(process.name), signal.SIGKILL)
                ended += 1
    return ended


kill_marked_there = ray.remote(num_cpus=0)(kill_marked)


@dataclass(frozen=True, slots=True)
class Step:
    """What came of a worker's latest step.

    Attributes:
        record: of the cell that is done with.
        retried: why its cell is tried once more.
    """

    record: CellRecord | None = None
    retried: str | None = None


@dataclass(slots=True)
class Lane:
    """A worker, and the cells that it has still to measure, the one in work first."""

    cells: deque[Cell]
    matrix: MatrixRecipe
    runs: Mapping[RunKey, Run]
    attempt: int = 1
    began: float = 0.0
    node: str | None = None  # of the worker; None until it runs
    worker: Any = None
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def cost(self) -> float:
        return cost(self.cells[0], self.matrix)

    @property
    def seconds_left(self) -> float:
        """Of the cell in work; waiting for a device takes as long as it takes."""
        limit = 60 * self.matrix.cell_minutes
        return limit if self.node is None else self.began + limit - time.monotonic()

    def start(self) -> "ray.ObjectRef[Any]":
        """Begin the next step: the worker's start, or the first cell's measurement."""
        self.began = time.monotonic()
        if self.worker is None:
            options = resources(self.cells[0], self.matrix)
            self.worker = CellWorker.options(**options).remote(self.matrix, sys.argv, self.mark)  # type: ignore[attr-defined]
            return self.worker.node.remote()
        return self.worker.measure.remote(self.cells[0], self.runs[self.cells[0].run_key])

    def finish(self, ref: "ray.ObjectRef[Any]") -> Step:
        """Take what the step came to."""
        try:
            found = ray.get(ref)
        except Exception as error:  # whatever it is, the other cells are to be measured
            return self.fail(input_error_in(error) or last_line(error))
        if self.node is None:
            self.node = found
            return Step()
        result, provenance = found
        return self._done(status="done", result=result, provenance=provenance)

    def expire(self) -> Step:
        """End the step, which has taken too long."""
        return self.fail(f"no result after cell_minutes={self.matrix.cell_minutes:g}")

    def fail(self, why: str) -> Step:
        """The first cell goes to a fresh worker, for this one may hold anything in memory; or its failure is kept."""
        node = self.node
        self.close()
        if node is not None:
            self._end_children(node)
        if self.attempt < MAX_ATTEMPTS:
            self.attempt += 1
            return Step(retried=why)
        return self._done(status="failed", error=why, provenance=collect_provenance(sys.argv))

    def close(self) -> None:
        """End the worker."""
        if self.worker is None:
            return
        patience = CLOSE_SECONDS if self.seconds_left > 0 else 0.0  # one that hangs does not listen
        with suppress(RayError):  # GetTimeoutError is one
            ray.get(self.worker.close.remote(), timeout=patience)
        ray.kill(self.worker)
        self.worker = self.node = None

    def _end_children(self, node: str) -> None:
        where = NodeAffinitySchedulingStrategy(node, soft=False)
        with suppress(RayError):  # the node has gone, and they with it
            ray.get(kill_marked_there.options(scheduling_strategy=where).remote(self.mark), timeout=CLOSE_SECONDS)

    def _done(self, **fields: Any) -> Step:
        cell, seconds = self.cells.popleft(), round(time.monotonic() - self.began, 2)
        record = CellRecord(key=cell.key, cell=cell, attempts=self.attempt, seconds=seconds, **fields)
        self.attempt = 1
        return Step(record)


def last_line(error: BaseException) -> str:
    """What a traceback ends with."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
