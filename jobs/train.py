"""Distil the teacher into a CLLM with Ray Train (paper algorithm 2), and export a plain Hugging Face checkpoint.

python jobs/train.py --recipe demo
"""

import argparse
import sys

from cllm.recipe import Recipe
from cllm.training.session import check_trajectories
from jobs import stages
from jobs.cli import main, stage
from jobs.cluster import connect
from jobs.training import fit


def run(recipe: Recipe, arguments: argparse.Namespace) -> None:
    output = stages.train(recipe)
    output.require_sources()
    check_trajectories(recipe)
    connect(recipe)
    with stage(f"student: consistency distillation, {recipe.train.optim.steps} steps"):
        fit(recipe, output, recipe.train.optim, sys.argv)


if __name__ == "__main__":
    sys.exit(main(run, __doc__))
