"""Run all stages of a recipe: prompts, teacher, trajectories, student, evaluation.

    python jobs/pipeline.py --recipe demo

A stage whose output is there and valid is skipped, so a run that was interrupted goes on where it stopped. With
`--set storage=s3://bucket/run` finished outputs are copied there, and a run on another machine goes on from them. The
last line is one JSON document, and above it stand the evaluation's table and an answer being decoded.
"""

import argparse
import sys
import time
from functools import partial

from cllm.recipe import Recipe
from jobs import collect, evaluate, finetune, prepare, stages, train
from jobs.cli import Job, main, print_last_line_json
from jobs.show import show


def run(recipe: Recipe, arguments: argparse.Namespace) -> None:
    start = time.monotonic()
    steps: list[tuple[stages.Stage, Job]] = [(stages.prepare(recipe), prepare.run)]
    if recipe.finetune is not None:
        steps.append((stages.finetune(recipe), finetune.run))
    steps += [
        (stages.collect(recipe), collect.run),
        (stages.train(recipe), train.run),
        (stages.evaluate(recipe), evaluate.run),
    ]
    made = [stages.skip_if_current(output, partial(make, recipe, arguments)) for output, make in steps]
    if not made[-1]:  # a new evaluation has been shown
        show(evaluate.read_results(recipe))
    print_last_line_json(evaluate.summary(recipe) | {"pipeline_seconds": round(time.monotonic() - start, 1)})


if __name__ == "__main__":
    sys.exit(main(run, __doc__))
