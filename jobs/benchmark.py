"""Measure a matrix of models, methods and concurrencies with Ray, and write one report about it.

    python jobs/benchmark.py --matrix demo
    python jobs/benchmark.py --matrix small --set gpus=4 --set output=/shared/benchmark

Every cell has a GPU, or a machine without GPUs, to itself. A finished cell is kept in the folder `output`, so a job
that was killed goes on where it stopped. The last line is one JSON document; the exit code is 1 if a cell failed.
"""

import os
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from statistics import fmean, median
from typing import Any

import ray
import torch
from ray.exceptions import RayError

from cllm.bench.matrices import MATRICES, get_matrix
from cllm.bench.matrix import Cell, MatrixRecipe, Platform, RunKey
from cllm.bench.matrix_results import (
    CellRecord,
    CellResult,
    MatrixResults,
    read_records,
    write_record,
    write_results,
)
from cllm.bench.measure import Workbench
from cllm.bench.plan import Plan, plan
from cllm.bench.prompts import Run
from cllm.errors import InputError
from cllm.provenance import collect_provenance
from cllm.report.benchmark import write_report
from jobs.cli import main_with, print_last_line_json, stage
from jobs.cluster import start
from jobs.errors import input_error_in
from jobs.pool import exclusive, exclusive_places

MAX_ATTEMPTS = 2
CLOSE_SECONDS = 60.0  # for a worker to give its memory back


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return main_with(
        lambda matrix: len(run(matrix).failed), __doc__, argv, kind="matrix", names=MATRICES, get=get_matrix
    )


def run(matrix: MatrixRecipe) -> MatrixResults:
    """Measure what is missing, and write results and report.

    Raises:
        InputError: too few GPUs, an unknown run, a folder with results that cannot be read, or no cell that can run.
    """
    began = time.monotonic()
    matrix = matrix.model_copy(update={"output": str(Path(matrix.output).absolute())})
    folder = Path(matrix.output)
    kept = read_records(folder)
    start()
    check_gpus(matrix)
    found: Plan = ray.get(planned.options(**exclusive(matrix.gpus)).remote(matrix))
    for obstacle in found.cannot_run:
        print(f"cannot run: {obstacle}", flush=True)
    if not found.cells:
        raise InputError(f"matrix {matrix.name}: no cell can run; the first reason: {found.cannot_run[0]}")
    todo = [cell for cell in found.cells if cell.key not in kept or kept[cell.key].status == "failed"]
    with stage(f"benchmark {matrix.name}: {len(found.cells)} cells, {len(found.cells) - len(todo)} of them finished"):
        measure_all(todo, found.runs, matrix)
        results = write_results(folder, matrix, found.cannot_run)
        write_report(results, folder)
    print_last_line_json(
        {
            "matrix": matrix.name,
            "cells": len(found.cells),
            "kept": len(found.cells) - len(todo),
            "failed": [record.cell.title for record in results.failed],
            "cannot_run": len(found.cannot_run),
            "seconds": round(time.monotonic() - began, 1),
        }
    )
    return results


def check_gpus(matrix: MatrixRecipe) -> None:
    """Refuse what a machine by itself would wait for without end; a cluster may grow.

    Raises:
        InputError: this machine has fewer GPUs than the matrix asks for.
    """
    available = ray.cluster_resources().get("GPU", 0)
    if matrix.gpus > available:
        shortage = f"gpus: the matrix asks for {matrix.gpus} GPUs, there are {available:g}"
        if not os.environ.get("RAY_ADDRESS"):
            raise InputError(shortage)
        print(f"warning: {shortage}; waiting for the cluster to grow", file=sys.stderr)


@ray.remote
def planned(matrix: MatrixRecipe) -> Plan:
    """The plan as a machine sees it that will run the cells: its device, its versions, its packages."""
    set_threads(matrix)
    return plan(matrix, Platform.here())


def set_threads(matrix: MatrixRecipe) -> None:
    if not matrix.gpus:
        torch.set_num_threads(matrix.threads)


@ray.remote
class CellWorker:
    """Measures the cells of one model on a device of its own."""

    def __init__(self, matrix: MatrixRecipe, command: Sequence[str]) -> None:
        set_threads(matrix)
        self.command = command
        self.workbench = Workbench()

    def measure(self, cell: Cell, run: Run) -> tuple[CellResult, dict[str, Any]]:
        """The result, and where it is from.

        Raises:
            InputError: this machine is another one than the plan was made for, or the model cannot be used so.
        """
        here = Platform.here().for_engine(cell.engine)
        if here != cell.platform:
            raise InputError(f"planned for {cell.platform}, this machine is {here}: measure each kind by itself")
        figures = self.workbench.measure(cell, run)
        return CellResult.from_data(figures, where=cell.title), collect_provenance(self.command)

    def close(self) -> None:
        """Before the worker is killed: vLLM's processes would outlive it and keep the GPU."""
        self.workbench.close()


@dataclass(slots=True)
class Lane:
    """A worker, and the cells that it has still to measure, the one in work first."""

    cells: deque[Cell]
    matrix: MatrixRecipe
    runs: Mapping[RunKey, Run]
    attempt: int = 1
    since: float = 0.0
    worker: Any = None

    def start(self) -> "ray.ObjectRef[Any]":
        """Begin with the first cell."""
        if self.worker is None:
            self.worker = CellWorker.options(**exclusive(self.matrix.gpus)).remote(self.matrix, sys.argv)  # type: ignore[attr-defined]
        self.since = time.monotonic()
        return self.worker.measure.remote(self.cells[0], self.runs[self.cells[0].run_key])

    def finish(self, ref: "ray.ObjectRef[Any]") -> CellRecord | None:
        """The record of the first cell, which is then done with; None if it is to be tried again."""
        cell, seconds = self.cells[0], round(time.monotonic() - self.since, 2)
        common: dict[str, Any] = {"key": cell.key, "cell": cell, "attempts": self.attempt, "seconds": seconds}
        try:
            result, provenance = ray.get(ref)
            record = CellRecord(**common, status="done", result=result, provenance=provenance)
        except Exception as error:  # whatever it is, the other cells are to be measured
            why = input_error_in(error) or last_line(error)
            self.close()  # a worker that failed may hold anything in memory
            self.attempt += 1
            if self.attempt <= MAX_ATTEMPTS:
                print(f"{cell.title}: {why}; trying once more", flush=True)
                return None
            record = CellRecord(**common, status="failed", error=why, provenance=collect_provenance(sys.argv))
        self.cells.popleft()
        self.attempt = 1
        return record

    def close(self) -> None:
        if self.worker is not None:
            with suppress(RayError):  # GetTimeoutError is one
                ray.get(self.worker.close.remote(), timeout=CLOSE_SECONDS)
            ray.kill(self.worker)
            self.worker = None


def measure_all(todo: Sequence[Cell], runs: Mapping[RunKey, Run], matrix: MatrixRecipe) -> None:
    """Measure cells in as many lanes as there are devices, and write a record for each as soon as it is there."""
    groups = deque(deque(cells) for _, cells in groupby(todo, key=lambda cell: cell.group))
    places = exclusive_places(matrix.gpus)
    progress = Progress(len(todo), min(places, len(groups)))
    running: dict[Any, Lane] = {}
    while groups or running:
        while groups and len(running) < places:
            lane = Lane(groups.popleft(), matrix, runs)
            running[lane.start()] = lane
        (ref,), _ = ray.wait(list(running))
        lane = running.pop(ref)
        record = lane.finish(ref)
        if record is not None:
            write_record(Path(matrix.output), record)
            progress.show(record)
        if lane.cells:
            running[lane.start()] = lane
        else:
            lane.close()


@dataclass(slots=True)
class Progress:
    """A line for each finished cell, with the time that the others will take if they are like those so far."""

    total: int
    places: int
    seconds: list[float] = field(default_factory=list)

    def show(self, record: CellRecord) -> None:
        self.seconds.append(record.seconds)
        left = (self.total - len(self.seconds)) * fmean(self.seconds) / self.places
        print(
            f"[{len(self.seconds)}/{self.total}] {record.cell.title}: {outcome(record)} "
            f"({record.seconds:.0f} s; about {left / 60:.1f} min left)",
            flush=True,
        )


def outcome(record: CellRecord) -> str:
    result = record.result
    if result is None:
        return f"failed: {record.error}"
    score = f", {fmean(result.scores):.1%}" if result.scores else ""
    return f"{median(result.tokens_per_s):,.0f} tokens/s, {result.tpf:.2f} tokens/forward{score}"


def last_line(error: BaseException) -> str:
    """What a traceback ends with."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
