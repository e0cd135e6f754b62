"""Compare teacher and CLLM on held-out prompts with Ray: quality, tokens per forward, speed.

    python jobs/evaluate.py --recipe demo

A pool of actors decodes all prompts by AR and by Jacobi decoding; the task scores the responses; then one process with
a machine (or a GPU) of its own times the methods. On a terminal an answer is then decoded while one looks on. The last
line is one JSON document.
"""

import argparse
import json
import pickle
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from cllm.artifacts import write_artifact
from cllm.errors import InputError
from cllm.evaluation.decode import by_length, methods
from cllm.evaluation.live import Step, live_steps
from cllm.evaluation.outputs import ChunkLikelihood, ChunkOutputs, Evaluator, Output
from cllm.evaluation.results import CLLM, Key, Measurements, build_results, merge_chunks, samples, summarise
from cllm.evaluation.subject import (
    SUBJECTS,
    check_tokenizers,
    checkpoint_revision,
    load_decoder,
    prompt_tokenizer,
)
from cllm.evaluation.timing import Timing, time_methods
from cllm.layout import RunLayout
from cllm.models import default_device
from cllm.provenance import collect_provenance
from cllm.recipe import Recipe
from cllm.report.markdown import report
from cllm.report.plot import plot_acceptance
from cllm.report.steps import step_texts
from cllm.tasks.prompts import Prompt, draw_prompts
from cllm.tasks.registry import load_task
from jobs import stages
from jobs.cli import main, print_last_line_json, stage
from jobs.cluster import connect
from jobs.pool import actor_pool, whole_machine
from jobs.show import marked, show

RESULTS_NAME = "results.json"
NUM_EXAMPLES = 2  # responses shown step by step
LIKELIHOOD = "likelihood"  # of the reference answers; beside the methods, a part of the work on a chunk


class ChunkRunner:
    """A Ray Data actor: turns (model, part of the work, chunk number) into the model's outputs or likelihoods."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.methods = {method.name: method for method in methods(recipe.evaluate.block_size)}
        self.work: tuple[Evaluator, list[list[Prompt]]] | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        (name,), (part,), (index,) = batch["subject"].tolist(), batch["part"].tolist(), batch["chunk"].tolist()
        self.work = self.work or self.start()  # not in the constructor, whose errors Ray reports in hundreds of lines
        evaluator, prompts = self.work[0], self.work[1][index]
        if part == LIKELIHOOD:
            found: ChunkOutputs | ChunkLikelihood = evaluator.rate(name, prompts)
        else:
            found = evaluator.decode(name, self.methods[part], prompts)
        # Pickled by hand: Ray Data would do the same to a column of objects, with a warning.
        return {"found": np.array([pickle.dumps(found)], dtype=object)}

    def start(self) -> tuple[Evaluator, list[list[Prompt]]]:
        device = default_device()
        if device.type == "cpu":
            torch.set_num_threads(self.recipe.resources.cpus_per_actor)
        prompts = drawn_prompts(self.recipe)
        return Evaluator(self.recipe, prompts, device), chunks(self.recipe, prompts)


def drawn_prompts(recipe: Recipe) -> list[Prompt]:
    """Test prompts, as many as the recipe wants.

    Raises:
        InputError: there are none.
    """
    path = RunLayout.of(recipe).prompts_file
    prompts = draw_prompts(path, "test", recipe.evaluate.num_prompts)
    if not prompts:
        raise InputError(f"{path}: no prompts in split test to evaluate on")
    return prompts


def chunks(recipe: Recipe, prompts: Sequence[Prompt]) -> list[list[Prompt]]:
    """The units of work, each one decoding batch."""
    return list(by_length(prompts, recipe.evaluate.batch_size))


def run(recipe: Recipe, arguments: argparse.Namespace) -> None:
    start = time.monotonic()
    output = stages.evaluate(recipe)
    output.require_sources()
    check_tokenizers(recipe)
    prompts = drawn_prompts(recipe)
    connect(recipe)
    provenance = collect_provenance(sys.argv)
    with (
        stage(f"evaluation: teacher and CLLM on {count_of(prompts, recipe)}"),
        write_artifact(output.path, kind=output.kind, inputs=output.inputs, provenance=provenance) as folder,
    ):
        measured, hardware = measure(recipe, prompts)
        weights = {name: checkpoint_revision(name, recipe) for name in SUBJECTS}
        metric = load_task(recipe.placed_task).metric
        results = build_results(recipe, measured, metric=metric, provenance=provenance, weights=weights)
        results |= {"speed_hardware": hardware, "seconds": round(time.monotonic() - start, 1)}
        results |= {"examples": examples(recipe, measured)}
        write_results(folder, results, measured)
    show(results, decode_live(recipe, prompts[0]) if sys.stdout.isatty() else None)
    print_last_line_json(summary(recipe))


def summary(recipe: Recipe) -> dict[str, Any]:
    """The run's evaluation in a few figures.

    Raises:
        InputError: there is no finished evaluation.
    """
    return summarise(read_results(recipe))


def read_results(recipe: Recipe) -> dict[str, Any]:
    """The document of the run's evaluation.

    Raises:
        InputError: there is no finished evaluation.
    """
    output = stages.evaluate(recipe)
    output.require()
    document: dict[str, Any] = json.loads((output.path / RESULTS_NAME).read_text())
    return document


def count_of(prompts: Sequence[Prompt], recipe: Recipe) -> str:
    wanted = recipe.evaluate.num_prompts
    return f"{len(prompts)} prompts" + (f" (all there are; {wanted} wanted)" if len(prompts) < wanted else "")


def measure(recipe: Recipe, prompts: list[Prompt]) -> tuple[Measurements, dict[str, Any]]:
    """Decode, score, then time; and the hardware that the timing ran on."""
    outputs, nll = merge_chunks(prompts, decode_all(recipe, prompts))
    scores = score_all(recipe, prompts, outputs)
    timed = prompts[: recipe.evaluate.speed_prompts]
    timings, hardware = time_alone(recipe, timed)
    return Measurements(prompts, outputs, scores, nll, timings, len(timed)), hardware


def decode_all(recipe: Recipe, prompts: Sequence[Prompt]) -> list[ChunkOutputs | ChunkLikelihood]:
    """Both models' outputs by all methods, from a pool of actors that is gone afterwards; prints progress.

    In the order that suits an `Evaluator`: an actor changes what it holds a few times.
    """
    parts = (LIKELIHOOD, *(method.name for method in methods(recipe.evaluate.block_size)))
    numbers = range(len(chunks(recipe, prompts)))
    work = [{"subject": name, "part": part, "chunk": index} for name, part, index in product(SUBJECTS, parts, numbers)]
    pool = actor_pool(recipe, len(work))
    results = ray.data.from_items(work, override_num_blocks=len(work)).map_batches(
        ChunkRunner,
        batch_size=1,
        compute=pool.strategy,
        num_cpus=pool.num_cpus,
        num_gpus=pool.num_gpus,
        fn_constructor_kwargs={"recipe": recipe},
    )
    start = time.monotonic()
    collected: list[ChunkOutputs | ChunkLikelihood] = []
    for row in results.iter_rows():
        collected.append(pickle.loads(row["found"]))
        if len(collected) % len(numbers) == 0:
            print(f"evaluated {len(collected)}/{len(work)} chunks, {time.monotonic() - start:.0f} s", flush=True)
    return collected


def score_all(
    recipe: Recipe, prompts: Sequence[Prompt], outputs: Mapping[Key, Sequence[Output]]
) -> dict[Key, list[float]]:
    """The task's scores. A text that several methods give is scored once: a score may take a sandbox or a database."""
    texts = sorted({(row, output.text) for column in outputs.values() for row, output in enumerate(column)})
    scored = ray.get(score.remote(recipe, [prompts[row] for row, _ in texts], [text for _, text in texts]))
    score_of = dict(zip(texts, scored, strict=True))
    return {key: [score_of[row, output.text] for row, output in enumerate(column)] for key, column in outputs.items()}


@ray.remote(num_cpus=1)
def score(recipe: Recipe, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
    references, contexts = [prompt.reference_text for prompt in prompts], [prompt.context for prompt in prompts]
    return load_task(recipe.placed_task).score(texts, references, contexts)


def time_alone(recipe: Recipe, prompts: Sequence[Prompt]) -> tuple[dict[Key, Timing], dict[str, Any]]:
    """Time all methods in one process that has a GPU, or a whole machine, to itself; and the hardware that it had."""
    print(f"timing {len(prompts)} prompts × {recipe.evaluate.speed_repeats} repeats, one at a time", flush=True)
    timings, hardware = ray.get(time_subjects.options(**whole_machine(recipe)).remote(recipe, prompts))
    return timings, hardware


@ray.remote
def time_subjects(recipe: Recipe, prompts: Sequence[Prompt]) -> tuple[dict[Key, Timing], dict[str, Any]]:
    device = default_device()
    if device.type == "cpu":
        torch.set_num_threads(recipe.resources.cpus_per_worker)
    subjects = {name: load_decoder(name, recipe, device) for name in SUBJECTS}
    candidates = {
        (name, method.name): (subject, method)
        for name, subject in subjects.items()
        for method in methods(recipe.evaluate.block_size)
    }
    hardware = collect_provenance(())["hardware"] | {"threads": torch.get_num_threads()}
    return time_methods(candidates, prompts, recipe.evaluate), hardware


def decode_live(recipe: Recipe, prompt: Prompt) -> Iterator[Step]:
    """The CLLM's answer to a prompt while it is decoded, on a GPU where there is one."""
    steps: Any = decode_alone.options(**whole_machine(recipe)).remote(recipe, prompt)  # a stream of references
    yield from map(ray.get, steps)


@ray.remote(num_returns="streaming")
def decode_alone(recipe: Recipe, prompt: Prompt) -> Iterator[Step]:
    device = default_device()
    if device.type == "cpu":
        torch.set_num_threads(recipe.resources.cpus_per_worker)
    subject = load_decoder("cllm", recipe, device)
    yield from live_steps(subject, prompt_tokenizer(recipe), prompt, recipe.evaluate)


def examples(recipe: Recipe, measured: Measurements) -> list[dict[str, Any]]:
    """The CLLM's first responses: the prompt, and what each forward pass added by AR and by Jacobi decoding."""
    tokenizer = prompt_tokenizer(recipe)
    columns: dict[str, Key] = {"ar": ("cllm", "ar"), "jacobi": CLLM}

    def texts(row: int, key: Key) -> list[str]:
        output = measured.outputs[key][row]
        return step_texts(tokenizer, output.token_ids, output.accepted)

    return [
        {"prompt": prompt.prompt_text} | {name: texts(row, key) for name, key in columns.items()}
        for row, prompt in enumerate(measured.prompts[:NUM_EXAMPLES])
    ]


def write_results(folder: Path, results: dict[str, Any], measured: Measurements) -> None:
    (folder / RESULTS_NAME).write_text(json.dumps(results, indent=1, allow_nan=False))
    (folder / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in samples(measured)))
    plot_acceptance(results, folder / "plot.svg")
    (folder / "report.md").write_text(report(results, [marked(example) for example in results["examples"]], "plot.svg"))


if __name__ == "__main__":
    sys.exit(main(run, __doc__))
