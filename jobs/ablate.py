"""Train and measure a grid of students of one run, and say which settings matter.

    python jobs/ablate.py --grid demo
    python jobs/ablate.py --grid small --set gpus=4 --set 'base.overrides=["task.source=DIR"]'

Every student starts at the base run's teacher and has a GPU, or a machine without GPUs, to itself. Trajectories are
collected once for each block size. A finished student's figures are kept in the folder `output`, so a job that was
killed goes on where it stopped; weights are not, so a student that is to be decoded with one more n is trained again.
The last line is one JSON document; the exit code is 1 if a student failed.
"""

import argparse
import json
import shlex
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import ray
import torch
from ray.exceptions import RayError

from cllm.ablation.cell import make_cell
from cllm.ablation.data import BaseRun, covers, cut_trajectories, placed
from cllm.ablation.document import AblationDocument, write_document
from cllm.ablation.figure import plot_effects
from cllm.ablation.grid import Grid, Student, decoded_further, students, title_of
from cllm.ablation.grids import GRIDS, get_grid
from cllm.ablation.results import FIGURES_NAME, KIND, gather, read_figures
from cllm.ablation.student import make_student
from cllm.ablation.summary import sentences
from cllm.artifacts import write_artifact, write_atomic
from cllm.bench.matrix import Platform
from cllm.errors import InputError
from cllm.layout import RunLayout
from cllm.models import default_device
from cllm.provenance import collect_provenance
from cllm.recipe import Recipe
from cllm.report.ablation_page import ablation_page
from cllm.tasks.prompts import draw_prompts
from jobs import collect, stages
from jobs.cli import main_with, print_last_line_json, stage
from jobs.cluster import connect
from jobs.errors import input_error_in
from jobs.pool import exclusive, exclusive_places
from jobs.stages import Stage

FIGURE_NAME = "effects.svg"
SUMMARY_NAME = "ablation.md"
MAX_DEATHS = 3  # of the worker that makes a student


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return main_with(run, __doc__, argv, kind="grid", names=GRIDS, get=get_grid)


@dataclass(frozen=True, slots=True)
class Measured:
    """A student with one way of decoding it, and the folder that the figures go into."""

    student: Student
    stage: Stage


@dataclass(frozen=True, slots=True)
class Work:
    """One training, and all that is measured of the student."""

    title: str
    parts: tuple[Measured, ...]

    @property
    def missing(self) -> "Work":
        """What is not finished of it."""
        return replace(self, parts=tuple(part for part in self.parts if not part.stage.is_current))


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
    own = students(grid)
    base = read_base(grid)
    connect(own[0].recipe)
    with stage(f"ablation {grid.name}: data of {len(own)} students"):
        data = Path(grid.output) / "data"
        own = [replace(student, recipe=placed(student.recipe, base, data)) for student in own]
        collect_missing([student.recipe for student in own], base)
    platform = ray.get(platform_here.options(**exclusive(grid.gpus)).remote(base.recipe.resources.cpus_per_worker))
    works = works_of([*own, *decoded_further(grid, own)], base, platform, grid)
    todo = [work.missing for work in works if work.missing.parts]
    with stage(f"ablation {grid.name}: {len(works)} students, {len(works) - len(todo)} of them finished"):
        missing = make_all(todo, base, platform, grid)
    finished = [(part.student, part.stage.path) for work in works for part in work.parts if part.stage.is_current]
    ablation = None
    if any(not student.further for student, _ in finished):
        ablation = gather(grid, finished, missing, collect_provenance(sys.argv))
        write_results(Path(grid.output), ablation)
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


def works_of(wanted: Sequence[Student], base: BaseRun, platform: Platform, grid: Grid) -> list[Work]:
    """A work for each training, in the order of the students."""
    parts: dict[str, list[Measured]] = {}
    for student in wanted:
        seed = f" seed={student.seed}" if student.seed != grid.seeds[0] else ""
        cell = make_cell(student, base, platform)
        output = Stage(KIND, "ablate", Path(grid.output) / "cells" / cell.key, cell.model_dump(mode="json"))
        parts.setdefault(title_of(grid, student.settings) + seed, []).append(Measured(student, output))
    return [Work(title, tuple(found)) for title, found in parts.items()]


# It restarts as often as it dies, for the next student may do better than the one that was too large for the machine.
@ray.remote(max_restarts=-1, max_task_retries=MAX_DEATHS - 1)
class StudentWorker:
    """Makes students on a device of its own."""

    def __init__(self, base: BaseRun, platform: Platform, command: Sequence[str]) -> None:
        self.base, self.platform, self.command = base, platform, command

    def make(self, work: Work) -> Outcome:
        """Train a student, measure it, and write its figures. What goes wrong is in the outcome."""
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
        student = work.parts[0].student
        set_threads(student.recipe.resources.cpus_per_worker)
        here = Platform.here().for_engine("cllm")
        if here != self.platform:
            raise InputError(f"planned for {self.platform}, this machine is {here}: ablate each kind by itself")
        # The task's own files, such as databases, are the base run's.
        recipe = student.recipe.model_copy(update={"task": self.base.recipe.placed_task})
        evaluations = [part.student.recipe.evaluate for part in work.parts]
        found = make_student(recipe, student.seed, evaluations, default_device())
        provenance = collect_provenance(self.command)
        for part, figures in zip(work.parts, found, strict=True):
            output = part.stage
            with write_artifact(output.path, kind=output.kind, inputs=output.inputs, provenance=provenance) as folder:
                write_atomic(folder / FIGURES_NAME, figures.model_dump_json(indent=1))


def make_all(todo: Sequence[Work], base: BaseRun, platform: Platform, grid: Grid) -> list[str]:
    """Make students on as many devices as there are; returns those that failed, and why."""
    missing, since = [], time.monotonic()
    for done, outcome in enumerate(outcomes(todo, base, platform, grid), start=1):
        if outcome.error is not None:
            missing.append(f"{outcome.work.title}: {outcome.error}")
        left = (len(todo) - done) * (time.monotonic() - since) / done
        print(
            f"[{done}/{len(todo)}] {described(outcome)} ({outcome.seconds:.0f} s; about {left / 60:.1f} min left)",
            flush=True,
        )
    return missing


def outcomes(todo: Sequence[Work], base: BaseRun, platform: Platform, grid: Grid) -> Iterator[Outcome]:
    """Of all students, each as soon as it is there."""
    waiting = deque(todo)
    running: dict[Any, tuple[Any, Work, float]] = {}
    worker_type = StudentWorker.options(**exclusive(grid.gpus))  # type: ignore[attr-defined]
    places = min(exclusive_places(grid.gpus), len(todo))
    idle = workers = [worker_type.remote(base, platform, sys.argv) for _ in range(places)]
    while waiting or running:
        for worker in idle[: len(waiting)]:
            work = waiting.popleft()
            running[worker.make.remote(work)] = worker, work, time.monotonic()
        (ref, *_), _ = ray.wait(list(running))
        worker, work, start = running.pop(ref)
        idle = [worker]
        yield outcome_of(ref, work, start)
    for worker in workers:
        ray.kill(worker)


def outcome_of(ref: "ray.ObjectRef[Outcome]", work: Work, start: float) -> Outcome:
    try:
        return ray.get(ref)
    except RayError as error:  # the worker has died each time, for want of memory say
        why = f"its worker died {MAX_DEATHS} times ({type(error).__name__})"
        return Outcome(work, time.monotonic() - start, why)


def described(outcome: Outcome) -> str:
    if outcome.error is not None:
        return f"{outcome.work.title}: failed: {outcome.error}"
    return f"{outcome.work.title}: {'; '.join(map(figures_text, outcome.work.parts))}"


def figures_text(part: Measured) -> str:
    figures = read_figures(part.stage.path)
    window = f"n={part.student.window}: " if part.student.further else ""
    speed = f"{figures.tpf:.2f} tokens/forward, {median(figures.speedups):.2f} × AR"
    return f"{window}{speed}, {fmean(figures.scores):.1%}"


def write_results(folder: Path, ablation: AblationDocument) -> None:
    """Write all that is made from the students' figures: document, figure and page."""
    page = ablation_page(ablation, FIGURE_NAME)
    write_document(folder, ablation)
    if ablation.effects:
        plot_effects(ablation, folder / FIGURE_NAME)
    write_atomic(folder / SUMMARY_NAME, page)
    print(f"\n{page}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
