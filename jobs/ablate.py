"""Train and measure a grid of students of one run, and say which settings matter.

    python jobs/ablate.py --grid demo
    python jobs/ablate.py --grid small --set gpus=4 --set 'base.overrides=["task.source=DIR"]'

Every student starts at the base run's teacher and has a GPU, or a machine without GPUs, to itself. Trajectories are
collected once for each block size. A finished student's figures are kept in the folder `output`, so a job that was
killed goes on where it stopped. The last line is one JSON document; the exit code is 1 if a student failed.
"""

import argparse
import json
import shlex
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any, cast

import ray
import torch
from ray.util import ActorPool

from cllm.ablation.cell import make_cell
from cllm.ablation.data import BaseRun, covers, cut_trajectories, placed
from cllm.ablation.figure import plot_effects
from cllm.ablation.grid import Grid, Student, students, title_of
from cllm.ablation.grids import GRIDS, get_grid
from cllm.ablation.results import FIGURES_NAME, Ablation, gather, read_figures, write_document
from cllm.ablation.student import make_student
from cllm.ablation.summary import sentences, summary
from cllm.artifacts import write_artifact, write_atomic
from cllm.bench.matrix import Platform
from cllm.errors import InputError
from cllm.layout import RunLayout
from cllm.models import default_device
from cllm.provenance import collect_provenance
from cllm.recipe import Recipe
from cllm.tasks.prompts import draw_prompts
from jobs import collect, stages
from jobs.cli import main_with, print_last_line_json, stage
from jobs.cluster import connect
from jobs.errors import input_error_in
from jobs.pool import exclusive, exclusive_places
from jobs.stages import Stage

FIGURE_NAME = "effects.svg"
SUMMARY_NAME = "ablation.md"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return main_with(run, __doc__, argv, kind="grid", names=GRIDS, get=get_grid)


@dataclass(frozen=True, slots=True)
class Work:
    """A student to make, and the folder that its figures go into."""

    title: str
    student: Student
    stage: Stage


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a student went: where it failed, `error` says why."""

    work: Work
    seconds: float
    error: str | None = None


def run(grid: Grid) -> int:
    """Make the students that are missing, and write document, figure and page; returns how many failed.

    Raises:
        InputError: a level that the recipe refuses, a base run that is not there, or too few GPUs.
    """
    began = time.monotonic()
    grid = grid.model_copy(update={"output": str(Path(grid.output).absolute())})
    wanted = students(grid)
    base = read_base(grid)
    connect(wanted[0].recipe)
    with stage(f"ablation {grid.name}: data of {len(wanted)} students"):
        data = Path(grid.output) / "data"
        wanted = [replace(student, recipe=placed(student.recipe, base, data)) for student in wanted]
        collect_missing([student.recipe for student in wanted], base)
    platform = ray.get(platform_here.options(**exclusive(grid.gpus)).remote(base.recipe.resources.cpus_per_worker))
    works = [work_of(student, base, platform, grid) for student in wanted]
    todo = [work for work in works if not work.stage.is_current]
    with stage(f"ablation {grid.name}: {len(works)} students, {len(works) - len(todo)} of them finished"):
        missing = make_all(todo, base, platform, grid)
    finished = [(work.student, work.stage.path) for work in works if work.stage.is_current]
    ablation = gather(grid, finished, missing) if finished else None
    if ablation is not None:
        write_results(ablation)
    print_last_line_json(
        {
            "grid": grid.name,
            "students": len(works),
            "kept": len(works) - len(todo),
            "failed": missing,
            "beyond_noise": sentences(ablation.effects) if ablation else [],
            "seconds": round(time.monotonic() - began, 1),
        }
    )
    return len(missing)


def read_base(grid: Grid) -> BaseRun:
    """The base run, after checking that its prompts and its teacher are there.

    Raises:
        InputError: they are not; with the command that makes them.
    """
    recipe = grid.base.resolve()
    try:
        stages.prepare(recipe).require()
        if recipe.finetune is not None:
            stages.finetune(recipe).require()
    except InputError as error:
        command = ["python", "jobs/pipeline.py", "--recipe", grid.base.recipe]
        command += [word for override in grid.base.overrides for word in ("--set", override)]
        raise InputError(f"grid {grid.name}, base run: {error}, or {shlex.join(command)}") from error
    return BaseRun.read(recipe)


def collect_missing(recipes: Sequence[Recipe], base: BaseRun) -> None:
    """Collect the trajectories that no run has yet; those of fewer prompts are cut out of those of more."""
    widest_first = sorted(recipes, key=lambda recipe: -(recipe.collect.num_prompts or sys.maxsize))
    sources = [base.recipe]
    for recipe in {recipe.output: recipe for recipe in widest_first}.values():
        output = stages.collect(recipe)
        if not output.is_current:
            found = [source for source in sources if covers(source, recipe) and stages.collect(source).is_current]
            if found:
                cut(found[0], recipe, output)
            else:
                collect.run(recipe, argparse.Namespace())
        sources.append(recipe)


def cut(source: Recipe, recipe: Recipe, output: Stage) -> None:
    """The trajectories of the recipe's prompts out of a run that has them."""
    prompts = draw_prompts(RunLayout.of(recipe).prompts_file, "train", recipe.collect.num_prompts)
    provenance = collect_provenance(sys.argv)
    with write_artifact(output.path, kind=output.kind, inputs=output.inputs, provenance=provenance) as folder:
        ids = {prompt.prompt_id for prompt in prompts}
        rows = cut_trajectories(RunLayout.of(source).trajectories, folder, ids)
        (folder / "counts.json").write_text(json.dumps({"kept": rows}, indent=1))
    print(f"n={recipe.collect.block_size}: {rows} responses to {len(prompts)} prompts out of a wider run", flush=True)


@ray.remote
def platform_here(threads: int) -> Platform:
    """The kind of machine that students are made on."""
    set_threads(threads)
    return Platform.here().for_engine("cllm")


def set_threads(threads: int) -> None:
    if default_device().type == "cpu":
        torch.set_num_threads(threads)


def work_of(student: Student, base: BaseRun, platform: Platform, grid: Grid) -> Work:
    cell = make_cell(student, base, platform)
    output = Stage("ablation-cell", "ablate", Path(grid.output) / "cells" / cell.key, cell.model_dump(mode="json"))
    seed = f" seed={student.seed}" if student.seed != grid.seeds[0] else ""
    return Work(title_of(grid, student.settings) + seed, student, output)


@ray.remote(max_restarts=2, max_task_retries=2)
class StudentWorker:
    """Makes students on a device of its own."""

    def __init__(self, base: BaseRun, platform: Platform, command: Sequence[str]) -> None:
        self.base, self.platform, self.command = base, platform, command

    def make(self, work: Work) -> Outcome:
        """Train and measure a student, and write its figures. What goes wrong is in the outcome."""
        start = time.monotonic()
        try:
            self.write(work)
            error = None
        except Exception as raised:  # whatever it is, the other students are to be made
            error = input_error_in(raised) or f"{type(raised).__name__}: {raised}".splitlines()[0]
            if not isinstance(raised, InputError):
                traceback.print_exc()
        return Outcome(work, time.monotonic() - start, error)

    def write(self, work: Work) -> None:
        recipe = work.student.recipe
        set_threads(recipe.resources.cpus_per_worker)
        here = Platform.here().for_engine("cllm")
        if here != self.platform:
            raise InputError(f"planned for {self.platform}, this machine is {here}: ablate each kind by itself")
        # The task's own files, such as databases, are the base run's.
        recipe = recipe.model_copy(update={"task": self.base.recipe.placed_task})
        figures = make_student(recipe, work.student.seed, default_device())
        output, provenance = work.stage, collect_provenance(self.command)
        with write_artifact(output.path, kind=output.kind, inputs=output.inputs, provenance=provenance) as folder:
            write_atomic(folder / FIGURES_NAME, figures.model_dump_json(indent=1))


def make_all(todo: Sequence[Work], base: BaseRun, platform: Platform, grid: Grid) -> list[str]:
    """Make students on as many devices as there are; returns those that failed, and why."""
    places = min(exclusive_places(grid.gpus), len(todo))
    worker = StudentWorker.options(**exclusive(grid.gpus))  # type: ignore[attr-defined]
    workers = [worker.remote(base, platform, sys.argv) for _ in range(places)]
    made = ActorPool(workers).map_unordered(lambda worker, work: worker.make.remote(work), cast(list[Any], todo))
    missing, since = [], time.monotonic()
    for done, outcome in enumerate(made, start=1):
        if outcome.error is not None:
            missing.append(f"{outcome.work.title}: {outcome.error}")
        left = (len(todo) - done) * (time.monotonic() - since) / done
        print(
            f"[{done}/{len(todo)}] {described(outcome)} ({outcome.seconds:.0f} s; about {left / 60:.1f} min left)",
            flush=True,
        )
    for worker in workers:
        ray.kill(worker)
    return missing


def described(outcome: Outcome) -> str:
    if outcome.error is not None:
        return f"{outcome.work.title}: failed: {outcome.error}"
    figures = read_figures(outcome.work.stage.path)
    speed = f"{figures.tpf:.2f} tokens/forward, {median(figures.speedups):.2f} × AR"
    return f"{outcome.work.title}: {speed}, {fmean(figures.scores):.1%}"


def write_results(ablation: Ablation) -> None:
    """Write all that is made from the students' figures: document, figure and page."""
    folder, page = Path(ablation.grid.output), summary(ablation, FIGURE_NAME)
    write_document(folder, ablation, collect_provenance(sys.argv))
    if ablation.effects:
        plot_effects(ablation, folder / FIGURE_NAME)
    write_atomic(folder / SUMMARY_NAME, page)
    print(f"\n{page}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
