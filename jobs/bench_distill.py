"""Measure what distillation costs on a finished run: speed of collection, and tokens trained a block.

    python jobs/bench_distill.py --recipe demo

Both are compared with the way of the paper's code. One process with a machine (or a GPU) of its own measures; the last
line is one JSON document.
"""

import argparse
import json
import sys
from statistics import fmean
from typing import Any

import ray
import torch

from cllm.artifacts import write_artifact
from cllm.decoding.trajectories import Trajectory
from cllm.errors import InputError
from cllm.evaluation.collection_speed import Collector, time_collection
from cllm.evaluation.distill_costs import CostComparison, compare_lengths, compare_on, three_forwards_cost
from cllm.evaluation.results import without_folders
from cllm.evaluation.subject import prompt_tokenizer
from cllm.layout import teacher_path, teacher_revision
from cllm.models import load_model, pad_token_id
from cllm.provenance import collect_provenance
from cllm.recipe import LossConfig, Recipe
from cllm.report.distill_costs import TRAINING_GOAL, collection_document, comparison_document, costs_text
from cllm.training.session import read_trajectories, trajectory_documents
from cllm.training.sources import WindowGuess
from jobs import stages
from jobs.cli import main, print_last_line_json, stage
from jobs.cluster import connect
from jobs.collect import Teacher
from jobs.pool import whole_machine

RESULTS_NAME = "bench.json"
# An example in the middle of the paper's settings: prompt and response tokens, and the block size.
EXAMPLE_PROMPT, EXAMPLE_RESPONSE, EXAMPLE_BLOCK = 128, 256, 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--slow-prompts", type=int, default=8, metavar="N", help="prompts of the slow collection (default 8)"
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="timed repeats (default 5)")


def run(recipe: Recipe, arguments: argparse.Namespace) -> None:
    if min(arguments.slow_prompts, arguments.repeats) < 1:
        raise InputError("--slow-prompts and --repeats: must be at least 1")
    stages.prepare(recipe).require()
    stages.collect(recipe).require()
    connect(recipe)
    output = stages.bench(recipe)
    provenance = collect_provenance(sys.argv)
    with (
        stage("bench: collection and training against the paper's code"),
        write_artifact(output.path, kind=output.kind, inputs=output.inputs, provenance=provenance) as folder,
    ):
        task = measure.options(**whole_machine(recipe))
        figures = ray.get(task.remote(recipe, arguments.slow_prompts, arguments.repeats))
        document = figures | {"recipe": recipe.model_dump(mode="json"), "provenance": provenance}
        (folder / RESULTS_NAME).write_text(json.dumps(without_folders(document), indent=1, allow_nan=False))
    print(f"\n{costs_text(figures)}\n", flush=True)
    print_last_line_json(figures)


@ray.remote
def measure(recipe: Recipe, num_slow: int, repeats: int) -> dict[str, Any]:
    collection, hardware = measure_collection(recipe, num_slow, repeats)
    return {"collection": collection, "training_tokens": count_training(recipe), "hardware": hardware}


def measure_collection(recipe: Recipe, num_slow: int, repeats: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Speed of one actor on its first full batch, with the threads that the job gives an actor; and the hardware."""
    teacher = Teacher.load(recipe)
    model = teacher.engine.model
    reference = load_model(
        teacher_path(recipe), revision=teacher_revision(recipe), dtype=model.dtype, device=model.device
    )
    collector = Collector(teacher.engine, reference, teacher.tokenizer, recipe.collect, recipe.seed)
    prompts = [prompt for shard in teacher.shards for prompt in shard][: recipe.collect.batch_size]
    speed = time_collection(collector, prompts, num_one_by_one=num_slow, repeats=repeats)
    return collection_document(speed, torch.get_num_threads()), collect_provenance(())["hardware"]


def count_training(recipe: Recipe) -> dict[str, Any]:
    """Token-forwards a block for this run and for an example of the paper's size, by two losses each: the recipe's, and
    the paper's (one recorded state a block)."""
    rows = read_trajectories(recipe)
    counted = []
    for name, loss in (("recipe's", recipe.train.loss), ("one recorded state a block", LossConfig())):
        lengths = compare_lengths(EXAMPLE_PROMPT, EXAMPLE_RESPONSE, EXAMPLE_BLOCK, loss)
        example = f"{EXAMPLE_PROMPT} + {EXAMPLE_RESPONSE} tokens, n = {EXAMPLE_BLOCK}, computed without padding"
        counted += [("this run's", name, compare_run(recipe, rows, loss)), (example, name, lengths)]
    size = recipe.collect.block_size
    blocks = [three_forwards_cost(len(row.prompt_ids), len(row.response_ids), size).blocks for row in rows]
    return {
        "ratio": counted[0][2].ratio,
        "goal": TRAINING_GOAL,
        "block_size": size,
        "row_tokens": recipe.train.optim.row_tokens,
        "mean_lengths": {
            "prompt": fmean(len(row.prompt_ids) for row in rows),
            "response": fmean(len(row.response_ids) for row in rows),
            "blocks": fmean(blocks),
        },
        "rows": [{"responses": of, "loss": name} | comparison_document(both) for of, name, both in counted],
    }


def compare_run(recipe: Recipe, rows: list[Trajectory], loss: LossConfig) -> CostComparison:
    """Both schemes over the run's trajectories, packed into the recipe's rows as `loss` asks."""
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"loss": loss})})
    size = recipe.collect.block_size
    guess = WindowGuess(recipe.collect.guess, size, pad_token_id(prompt_tokenizer(recipe)))
    source = trajectory_documents(rows, recipe, guess)
    return compare_on(source, recipe.train.optim.row_tokens, size, loss, recipe.seed)


if __name__ == "__main__":
    sys.exit(main(run, __doc__, add_arguments=add_arguments))
