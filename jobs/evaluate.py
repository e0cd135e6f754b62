"""Compare teacher and CLLM on held-out prompts with Ray: quality, tokens per forward, speed.

    python jobs/evaluate.py --recipe demo

A pool of actors decodes all prompts by AR and by Jacobi decoding; the task scores the responses; then one process with
a machine (or a GPU) of its own times the methods. The last line is one JSON document.
"""

import argparse
import json
import pickle
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from transformers import PreTrainedTokenizerBase

from cllm.artifacts import write_artifact
from cllm.errors import InputError
from cllm.evaluation.decode import Engines, by_length, methods
from cllm.evaluation.outputs import ChunkOutputs, Output, run_chunk
from cllm.evaluation.results import CLLM, Key, Measurements, build_results, merge_chunks, samples, summarise
from cllm.evaluation.subject import (
    SUBJECTS,
    SubjectName,
    check_tokenizers,
    checkpoint_revision,
    load_subject,
    prompt_tokenizer,
)
from cllm.evaluation.timing import Timing, time_methods
from cllm.layout import RunLayout
from cllm.models import default_device
from cllm.provenance import collect_provenance
from cllm.recipe import Recipe
from cllm.report.markdown import report, results_text
from cllm.report.plot import plot_acceptance
from cllm.report.steps import step_example, step_texts
from cllm.tasks.prompts import Prompt, draw_prompts
from cllm.tasks.registry import load_task
from jobs import stages
from jobs.cli import main, print_last_line_json, stage
from jobs.cluster import connect
from jobs.pool import actor_pool, whole_machine

RESULTS_NAME = "results.json"
NUM_EXAMPLES = 2  # responses shown step by step


class ChunkRunner:
    """A Ray Data actor: holds one model at a time, turns (model, chunk number) into that model's outputs."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.work: tuple[PreTrainedTokenizerBase, list[list[Prompt]]] | None = None
        self.loaded: tuple[SubjectName, Engines] | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        (name,), (index,) = batch["subject"].tolist(), batch["chunk"].tolist()
        if self.work is None:  # not in the constructor, whose errors Ray reports in hundreds of lines
            self.work = prompt_tokenizer(self.recipe), chunks(self.recipe, drawn_prompts(self.recipe))
        tokenizer, prompts = self.work
        engines = self.engines(name, list(chain.from_iterable(prompts)))
        outputs = run_chunk(name, engines, tokenizer, prompts[index], self.recipe.evaluate)
        # Pickled by hand: Ray Data would do the same to a column of objects, with a warning.
        return {"outputs": np.array([pickle.dumps(outputs)], dtype=object)}

    def engines(self, name: SubjectName, prompts: list[Prompt]) -> Engines:
        """Those of the model of that name. Work comes model by model, so an actor changes models about once."""
        if self.loaded is None or self.loaded[0] != name:
            self.loaded = None  # two models may not fit into memory
            config = self.recipe.evaluate
            device = default_device()
            if device.type == "cpu":
                torch.set_num_threads(self.recipe.resources.cpus_per_actor)
            subject = load_subject(name, self.recipe, device)
            self.loaded = (name, Engines(subject, config, prompts, rows=config.batch_size, record=True))
        return self.loaded[1]


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
    stages.prepare(recipe).require()
    stages.train(recipe).require()
    check_tokenizers(recipe)
    prompts = drawn_prompts(recipe)
    connect(recipe)
    output = stages.evaluate(recipe)
    provenance = collect_provenance(sys.argv)
    with (
        stage(f"evaluation: teacher and CLLM on {count_of(prompts, recipe)}"),
        write_artifact(output.path, kind=output.kind, inputs=output.inputs, provenance=provenance) as folder,
    ):
        measured, hardware = measure(recipe, prompts)
        weights = {name: checkpoint_revision(name, recipe) for name in SUBJECTS}
        metric = load_task(recipe.task).metric
        results = build_results(recipe, measured, metric=metric, provenance=provenance, weights=weights)
        results |= {"speed_hardware": hardware, "seconds": round(time.monotonic() - start, 1)}
        write_results(folder, results, measured, examples(recipe, measured, colour=False))
    print(f"\n{results_text(results)}\n", flush=True)
    print("\n\n".join(examples(recipe, measured, colour=sys.stdout.isatty())), flush=True)
    print_last_line_json(summary(recipe))


def summary(recipe: Recipe) -> dict[str, Any]:
    """The run's evaluation in a few figures.

    Raises:
        InputError: there is no finished evaluation.
    """
    output = stages.evaluate(recipe)
    output.require()
    return summarise(json.loads((output.path / RESULTS_NAME).read_text()))


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


def decode_all(recipe: Recipe, prompts: Sequence[Prompt]) -> list[ChunkOutputs]:
    """Both models' outputs by all methods, from a pool of actors that is gone afterwards; prints progress."""
    num_chunks = len(chunks(recipe, prompts))
    work = [{"subject": name, "chunk": index} for name in SUBJECTS for index in range(num_chunks)]
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
    collected: list[ChunkOutputs] = []
    for row in results.iter_rows():
        collected.append(pickle.loads(row["outputs"]))
        print(f"decoded {len(collected)}/{len(work)} chunks, {time.monotonic() - start:.0f} s", flush=True)
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
    return load_task(recipe.task).score(texts, references, contexts)


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
    subjects = {name: load_subject(name, recipe, device) for name in SUBJECTS}
    candidates = {
        (name, method.name): (subject, method)
        for name, subject in subjects.items()
        for method in methods(recipe.evaluate.block_size)
    }
    hardware = collect_provenance(())["hardware"] | {"threads": torch.get_num_threads()}
    return time_methods(candidates, prompts, recipe.evaluate), hardware


def examples(recipe: Recipe, measured: Measurements, *, colour: bool) -> list[str]:
    """The CLLM's first responses, step by step."""
    tokenizer = prompt_tokenizer(recipe)
    shown = []
    rows = zip(measured.prompts, measured.outputs[CLLM], measured.outputs["cllm", "ar"], strict=True)
    for prompt, output, ar in list(rows)[:NUM_EXAMPLES]:
        texts = step_texts(tokenizer, output.token_ids, output.accepted)
        shown.append(step_example(prompt.prompt_text, texts, len(ar.accepted), colour=colour))
    return shown


def write_results(folder: Path, results: dict[str, Any], measured: Measurements, shown: Sequence[str]) -> None:
    (folder / RESULTS_NAME).write_text(json.dumps(results, indent=1, allow_nan=False))
    (folder / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in samples(measured)))
    plot_acceptance(results, folder / "plot.svg")
    (folder / "report.md").write_text(report(results, shown, "plot.svg"))


if __name__ == "__main__":
    sys.exit(main(run, __doc__))
