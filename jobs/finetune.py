"""Fine-tune the teacher on the task's reference answers with Ray Train, from a checkpoint or from scratch.

python jobs/finetune.py --recipe demo
"""

import argparse
import sys

from cllm.layout import RunLayout
from cllm.models import load_tokenizer
from cllm.recipe import Recipe
from cllm.tasks.prompts import check_tokenizer
from jobs import stages
from jobs.cli import main, stage
from jobs.cluster import connect
from jobs.training import fit


def run(recipe: Recipe, arguments: argparse.Namespace) -> None:
    config = recipe.finetune
    if config is None:
        print("== teacher: used as it comes (the recipe has no finetune section)")
        return
    output = stages.finetune(recipe)
    output.require_sources()
    if (path := recipe.teacher.path) is not None:
        check_tokenizer(RunLayout.of(recipe).prompts_file, load_tokenizer(path, recipe.teacher.revision), path)
    connect(recipe)
    with stage(f"teacher: AR fine-tuning, {config.optim.steps} steps"):
        fit(recipe, output, config.optim, sys.argv)


if __name__ == "__main__":
    sys.exit(main(run, __doc__))
