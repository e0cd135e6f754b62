"""Measure a matrix of models, methods and concurrencies with Ray, and write one report about it.

    python jobs/benchmark.py --matrix demo
    python jobs/benchmark.py --matrix small --set gpus=4 --set output=/shared/benchmark

A timed cell has its GPUs, or a machine without GPUs, to itself. A finished cell is kept in the folder `output`, so a
job that was killed goes on where it stopped. There lie the report, all results, and the table's rows as plain JSON
(`rows.json`). The last line is one JSON document; the exit code is 1 if a cell failed.
"""

import os
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from statistics import fmean, median
from typing import Any

import ray

from cllm.bench.compare import compare
from cllm.bench.flat import write_rows
from cllm.bench.matrices import MATRICES, get_matrix
from cllm.bench.matrix import Cell, MatrixRecipe, Platform, RunKey
from cllm.bench.matrix_results import MatrixResults, read_records, write_record, write_results
from cllm.bench.plan import Plan, plan
from cllm.bench.prompts import Run
from cllm.bench.result import CellRecord
from cllm.errors import InputError
from cllm.report.benchmark import write_report
from jobs.cli import main_with, print_last_line_json, stage
from jobs.cluster import start
from jobs.lanes import Lane, Step, capacity, set_threads
from jobs.pool import exclusive


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
    for obstacle in found.left_out:
        print(f"left out: {obstacle}", flush=True)
    if not found.cells:
        raise InputError(f"matrix {matrix.name}: no cell can run; the first reason: {found.cannot_run[0]}")
    todo = [cell for cell in found.cells if cell.key not in kept or kept[cell.key].status == "failed"]
    with stage(f"benchmark {matrix.name}: {len(found.cells)} cells, {len(found.cells) - len(todo)} of them finished"):
        write_results(folder, matrix, found.cannot_run, found.left_out)  # so that a killed job can be reported
        measure_all(todo, found.runs, matrix)
        results = write_results(folder, matrix, found.cannot_run, found.left_out)
        write_rows(folder, compare(results.records))
        write_report(results, folder)
    print_last_line_json(
        {
            "matrix": matrix.name,
            "cells": len(found.cells),
            "kept": len(found.cells) - len(todo),
            "failed": [record.cell.title for record in results.failed],
            "cannot_run": len(found.cannot_run),
            "left_out": len(found.left_out),
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


def measure_all(todo: Sequence[Cell], runs: Mapping[RunKey, Run], matrix: MatrixRecipe) -> None:
    """Measure cells in as many lanes as there are devices, and write a record for each as soon as it is there."""
    waiting = deque(Lane(deque(cells), matrix, runs) for _, cells in groupby(todo, key=lambda cell: cell.group))
    room = capacity(matrix)
    at_once = int(room / min((lane.cost for lane in waiting), default=1))
    progress = Progress(len(todo), places=max(1, min(at_once, len(waiting))))
    running: dict[Any, Lane] = {}
    while waiting or running:
        while waiting and (not running or _taken(running) + waiting[0].cost <= room):
            lane = waiting.popleft()
            running[lane.start()] = lane
        for ref, step in _next_steps(running):
            lane = running.pop(ref)
            if step.retried is not None:
                progress.retry(lane.cells[0], step.retried)
            if step.record is not None:
                write_record(Path(matrix.output), step.record)
                progress.show(step.record)
            if lane.cells:
                running[lane.start()] = lane
            else:
                lane.close()


def _taken(running: Mapping[Any, Lane]) -> float:
    return sum(lane.cost for lane in running.values())


def _next_steps(running: Mapping[Any, Lane]) -> list[tuple[Any, Step]]:
    """Wait for a step to end, or to take too long."""
    patience = max(0.0, min(lane.seconds_left for lane in running.values()))
    done, _ = ray.wait(list(running), timeout=patience)
    if done:
        return [(ref, running[ref].finish(ref)) for ref in done]
    return [(ref, lane.expire()) for ref, lane in running.items() if lane.seconds_left <= 0]


@dataclass(slots=True)
class Progress:
    """A line for each finished cell, with the time that the others will take if they are like those so far."""

    total: int
    places: int  # cells measured at a time
    seconds: list[float] = field(default_factory=list)

    def show(self, record: CellRecord) -> None:
        self.seconds.append(record.seconds)
        left = (self.total - len(self.seconds)) * fmean(self.seconds) / self.places
        print(
            f"[{len(self.seconds)}/{self.total}] {record.cell.title}: {outcome(record)} "
            f"({record.seconds:.0f} s; about {left / 60:.1f} min left)",
            flush=True,
        )

    def retry(self, cell: Cell, why: str) -> None:
        print(f"{cell.title}: {why}; trying once more", flush=True)


def outcome(record: CellRecord) -> str:
    result = record.result
    if result is None:
        return f"failed: {record.error}"
    speed = f"{median(result.tokens_per_s):,.0f} tokens/s, " if result.tokens_per_s else ""
    score = f", {fmean(result.scores):.1%}" if result.scores else ""
    return f"{speed}{result.tpf:.2f} tokens/forward{score}"


if __name__ == "__main__":
    sys.exit(main())
