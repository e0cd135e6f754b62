"""Train the baselines with Ray Train: a distilled draft model and Medusa heads, in the layouts that vLLM loads.

    python jobs/baselines.py --recipe demo

Both learn from the responses that the CLLM is distilled from. What is there and valid is kept. The pipeline does not
run this job.
"""

import argparse
import sys
from functools import partial

from cllm.errors import InputError
from cllm.recipe import BaselinesConfig, OptimConfig, Recipe
from cllm.training.baselines import check_draft_source
from cllm.training.session import check_trajectories
from jobs import stages
from jobs.cli import main, stage
from jobs.cluster import connect
from jobs.training import fit


def run(recipe: Recipe, arguments: argparse.Namespace) -> None:
    section = recipe.baselines or BaselinesConfig()
    outputs: list[tuple[stages.Stage, OptimConfig, str]] = []
    if section.draft is not None:
        outputs.append((stages.draft(recipe), section.draft.optim, "distilled draft model"))
    if section.medusa is not None:
        outputs.append((stages.medusa(recipe), section.medusa.optim, f"Medusa-{section.medusa.variant} heads"))
    if not outputs:
        raise InputError(f"baselines: recipe {recipe.name} has neither a draft nor a medusa section")
    for output, optim, _ in outputs:
        optim.check_rows(f"baselines.{output.kind}.optim", recipe.resources.training_workers)
    outputs[0][0].require_sources()  # both read the same
    check_trajectories(recipe)
    check_draft_source(recipe)
    connect(recipe)
    for output, optim, title in outputs:
        stages.skip_if_current(output, partial(train, recipe, output, optim, title))


def train(recipe: Recipe, output: stages.Stage, optim: OptimConfig, title: str) -> None:
    with stage(f"{output.kind}: {title}, {optim.steps} steps"):
        fit(recipe, output, optim, sys.argv)


if __name__ == "__main__":
    sys.exit(main(run, __doc__))
