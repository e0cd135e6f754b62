"""Measure what distillation costs on a finished run: speed of collection, and tokens trained a block.

    python jobs/bench_distill.py --recipe demo
    python jobs/bench_distill.py --recipe gsm8k-small --actors 2    # and what a second actor brings
    python jobs/bench_distill.py --recipe spider-small --set teacher.path=/models/7b --set teacher.scratch=null \
        --set finetune=null --collection-only                       # needs prompts and teacher, nothing trained

Both are compared with the way of the paper's code. One process with a machine (or a GPU) of its own measures; the last
line is one JSON document.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import ray
import torch

from cllm.artifacts import write_artifact
from cllm.decoding.trajectories import Trajectory
from cllm.engine.collection import collect
from cllm.errors import InputError
from cllm.evaluation.collection_speed import Collector, time_collection
from cllm.evaluation.distill_costs import CostComparison, compare_lengths, compare_on, three_forwards_cost
from cllm.evaluation.results import without_folders
from cllm.evaluation.subject import prompt_tokenizer
from cllm.layout import teacher_path, teacher_revision
from cllm.models import load_model, pad_token_id
from cllm.provenance import collect_provenance
from cllm.recipe import LossConfig, Recipe
from cllm.report.distill_costs import (
    TRAINING_GOAL,
    collection_document,
    collection_text,
    comparison_document,
    costs_text,
)
from cllm.training.session import read_trajectories, trajectory_documents
from cllm.training.sources import WindowGuess
from jobs import stages
from jobs.cli import main, print_last_line_json, stage
from jobs.cluster import connect
from jobs.collect import Teacher
from jobs.pool import actor_pool, whole_machine

RESULTS_NAME = "bench.json"
# An example in the middle of the paper's settings: prompt and response tokens, and the block size.
EXAMPLE_PROMPT, EXAMPLE_RESPONSE, EXAMPLE_BLOCK = 128, 256, 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--slow-prompts", type=int, default=8, metavar="N", help="prompts of the slow collection (default 8)"
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="timed repeats (default 5)")
    parser.add_argument(
        "--actors", type=int, default=1, metavar="N", help="compare so many collecting actors with one (default: none)"
    )
    parser.add_argument(
        "--collection-only", action="store_true", help="measure collection alone, before anything is collected; no file"
    )


def run(recipe: Recipe, arguments: argparse.Namespace) -> None:
    if min(arguments.slow_prompts, arguments.repeats, arguments.actors) < 1:
        raise InputError("--slow-prompts, --repeats and --actors: must be at least 1")
    if arguments.collection_only:
        run_collection_alone(recipe, arguments)
        return
    output = stages.bench(recipe)
    output.require_sources()
    connect(recipe)
    provenance = collect_provenance(sys.argv)
    with (
        stage("bench: collection and training against the paper's code"),
        write_artifact(output.path, kind=output.kind, inputs=output.inputs, provenance=provenance) as folder,
    ):
        task = measure.options(**whole_machine(recipe))
        figures = ray.get(task.remote(recipe, arguments.slow_prompts, arguments.repeats))
        if arguments.actors > 1:
            figures["actors"] = measure_actors(recipe, arguments.actors)
        document = figures | {"recipe": recipe.model_dump(mode="json"), "provenance": provenance}
        (folder / RESULTS_NAME).write_text(json.dumps(without_folders(document), indent=1, allow_nan=False))
    print(f"\n{costs_text(figures)}\n", flush=True)
    print_last_line_json(figures)


def run_collection_alone(recipe: Recipe, arguments: argparse.Namespace) -> None:
    stages.collect(recipe).require_sources()
    connect(recipe)
    task: Any = ray.remote(measure_collection).options(**whole_machine(recipe))
    collection, hardware = ray.get(task.remote(recipe, arguments.slow_prompts, arguments.repeats))
    figures: dict[str, Any] = {"collection": collection, "hardware": hardware}
    if arguments.actors > 1:
        figures["actors"] = measure_actors(recipe, arguments.actors)
    print(f"\n{collection_text(collection)}\n", flush=True)
    provenance = collect_provenance(sys.argv) | {"hardware": hardware}
    print_last_line_json(
        without_folders(figures | {"recipe": recipe.model_dump(mode="json"), "provenance": provenance})
    )


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


class CollectingActor:
    """A Ray actor: what one of the collection job does, without files."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.teacher = Teacher.load(recipe)

    def collect(self, count: int, share: int, shares: int) -> int:
        """Response tokens collected for every `shares`-th of the first `count` prompts, from number `share` on."""
        prompts = [prompt for shard in self.teacher.shards for prompt in shard][:count][share::shares]
        teacher, config = self.teacher, self.recipe.collect
        rows, _ = collect(teacher.engine, teacher.tokenizer, prompts, config, self.recipe.seed)
        return sum(len(row.response_ids) for row in rows)


def measure_actors(recipe: Recipe, count: int) -> dict[str, Any]:
    """Response tokens a second of one actor, and of several that divide the same prompts, four batches for each.

    Raises:
        InputError: the cluster has no room for so many actors.
    """
    pool = actor_pool(recipe, count)
    kind, share = ("GPU", pool.num_gpus) if pool.num_gpus else ("CPU", pool.num_cpus)
    available = ray.cluster_resources().get(kind, 0)
    if count * (share or 0) > available:
        raise InputError(f"--actors {count}: they need {count * (share or 0):g} {kind}s, the cluster has {available:g}")
    num_prompts = 4 * count * recipe.collect.batch_size
    place: Any = ray.remote(num_cpus=pool.num_cpus or 1, num_gpus=pool.num_gpus or 0)(CollectingActor)
    actors = [place.remote(recipe) for _ in range(count)]
    ray.get([actor.collect.remote(num_prompts, 0, 1) for actor in actors])  # all of them have seen all prompts then
    speeds = []
    for active in (actors[:1], actors):
        start = time.perf_counter()
        shares = [actor.collect.remote(num_prompts, i, len(active)) for i, actor in enumerate(active)]
        speeds.append(sum(ray.get(shares)) / (time.perf_counter() - start))
    one, several = speeds
    return {"actors": count, "one_tokens_per_s": one, "all_tokens_per_s": several, "ratio": several / one}


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


def compare_run(recipe: Recipe, rows: Sequence[Trajectory], loss: LossConfig) -> CostComparison:
    """Both schemes over the run's trajectories, packed into the recipe's rows as `loss` asks."""
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"loss": loss})})
    size = recipe.collect.block_size
    guess = WindowGuess(recipe.collect.guess, size, pad_token_id(prompt_tokenizer(recipe)))
    source = trajectory_documents(rows, recipe, guess)
    return compare_on(source, recipe.train.optim.row_tokens, size, loss, recipe.seed)


if __name__ == "__main__":
    sys.exit(main(run, __doc__, add_arguments=add_arguments))
