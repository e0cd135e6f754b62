"""Fine-tune the teacher on the task's reference answers with Ray Train, from a checkpoint or from scratch.

python jobs/finetune.py --recipe demo
"""

import argparse
import sys

from cllm.recipe import Recipe
from jobs import stages
from jobs.cli import main, stage
from jobs.cluster import connect
from jobs.training import fit


def run(recipe: Recipe, arguments: argparse.Namespace) -> None:
    config = recipe.finetune
    if config is None:
        print("== teacher: used as it comes (the recipe has no finetune section)")
        return
    stages.prepare(recipe).require()
    connect(recipe)
    with stage(f"teacher: AR fine-tuning, {config.optim.steps} steps"):
        fit(recipe, stages.finetune(recipe), config.optim, sys.argv)


if __name__ == "__main__":
    sys.exit(main(run, __doc__))
