"""Estimate hours and dollars of a recipe on rented machines, from measured or assumed speeds.

    python jobs/estimate.py --recipe paper-gsm8k --instance p4d.24xlarge --response-tokens 160 \
        --results results/engine-h200.json --results-model llama-2-7b --speed-ratio 0.32 \
        --collect-tokens-per-s 700 --evaluate-tokens-per-s 700 --train-mfu 0.35 --parameters 7e9

Speeds are those of one GPU. What no results file tells must be given; a figure on the command line counts as assumed
and goes before a file's. Nothing is started. The last line is one JSON document.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from cllm.errors import InputError
from cllm.evaluation.subject import SUBJECTS
from cllm.recipe import Recipe
from cllm.report.costs import (
    Rates,
    costs_document,
    costs_table,
    dollars_per_million_tokens,
    estimate,
    stages_of,
    train_rate,
)
from cllm.report.prices import Price, price_of
from cllm.report.speeds import (
    Rate,
    Speed,
    collection_rate,
    evaluation_rate,
    read_speeds,
    serving_rate,
    timing_rate,
)
from jobs.cli import main, print_last_line_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--instance", required=True, metavar="NAME", help="machine of the workers, e.g. p4d.24xlarge")
    parser.add_argument("--dollars-per-hour", type=float, metavar="X", help="of one machine, instead of the table's")
    parser.add_argument("--gpu", metavar="NAME", help="GPU of a machine that is not in the table, e.g. A100")
    parser.add_argument("--gpus-per-instance", type=int, metavar="N", help="of a machine that is not in the table")
    parser.add_argument("--results", type=Path, nargs="+", default=[], metavar="FILE", help="measured speeds")
    parser.add_argument("--results-model", metavar="NAME", help="whose rows, where a file has those of several models")
    parser.add_argument("--speed-ratio", type=float, metavar="X", help="the machine's speed over the measured one's")
    parser.add_argument("--collect-tokens-per-s", type=float, metavar="X", help="response tokens, block decoding")
    parser.add_argument("--train-tokens-per-s", type=float, metavar="X", help="tokens of packed rows")
    parser.add_argument("--train-mfu", type=float, metavar="X", help="share of the GPU's peak; with --parameters")
    parser.add_argument("--parameters", type=float, metavar="N", help="of the model, e.g. 7e9")
    parser.add_argument("--evaluate-tokens-per-s", type=float, metavar="X", help="response tokens, batched")
    parser.add_argument("--timing-tokens-per-s", type=float, metavar="X", help="response tokens, one prompt at a time")
    parser.add_argument("--serve-tokens-per-s", type=float, metavar="X", help="of a busy replica")
    parser.add_argument("--response-tokens", type=float, required=True, metavar="X", help="mean length of a response")
    parser.add_argument("--prompts", type=int, metavar="N", help="train prompts, for recipes that take them all")
    parser.add_argument("--startup-minutes", type=float, default=20, metavar="X", help="until work begins (default 20)")
    parser.add_argument("--head-dollars-per-hour", type=float, default=0, metavar="X", help="head node (default 0)")


def run(recipe: Recipe, arguments: argparse.Namespace) -> None:
    price = machine(arguments)
    check_ratio(arguments.speed_ratio)
    speeds = measured(arguments, price)
    work = stages_of(
        recipe,
        rates(recipe, arguments, price, speeds),
        response_tokens=arguments.response_tokens,
        num_prompts=arguments.prompts,
    )
    costs = estimate(
        work,
        price,
        startup_hours=arguments.startup_minutes / 60,
        head_dollars_per_hour=arguments.head_dollars_per_hour,
    )
    document = costs_document(costs, price)
    print(f"\n{costs_table(costs, price)}\n", flush=True)
    serving = given(arguments, "serve") or serving_rate(speeds)
    if serving is not None:
        document["serving"] = {
            "dollars_per_million_tokens": dollars_per_million_tokens(serving, price),
            "tokens_per_s": serving.tokens_per_s,
        }
        print(
            f"Serving at {serving.tokens_per_s:,.0f} tokens/s a GPU, all busy ({serving.basis}, {serving.source}): "
            f"${dollars_per_million_tokens(serving, price):.2f} a million tokens\n",
            flush=True,
        )
    print_last_line_json(document)


def machine(arguments: argparse.Namespace) -> Price:
    """The machine from the table, at another price where one is given; or one that the command line describes."""
    dollars, gpu, gpus = arguments.dollars_per_hour, arguments.gpu, arguments.gpus_per_instance
    if dollars is not None and not dollars > 0:
        raise InputError(f"--dollars-per-hour: must be positive, got {dollars:g}")
    if gpus is not None and gpus < 0:
        raise InputError(f"--gpus-per-instance: must not be negative, got {gpus}")
    today = datetime.now(UTC).date().isoformat()
    if dollars is not None and gpus is not None:
        if bool(gpus) != (gpu is not None):
            raise InputError("--gpu and --gpus-per-instance: give both, or --gpus-per-instance 0 alone")
        return Price(arguments.instance, gpu, gpus, dollars, "command line", today)
    if gpu is not None or gpus is not None:
        raise InputError("--gpu, --gpus-per-instance: describe a machine with --dollars-per-hour as well")
    price = price_of(arguments.instance)
    if dollars is None:
        return price
    return replace(price, dollars_per_hour=dollars, source="command line", date=today)


def check_ratio(ratio: float | None) -> None:
    if ratio is not None and not ratio > 0:
        raise InputError(f"--speed-ratio: must be positive, got {ratio:g}")


def measured(arguments: argparse.Namespace, price: Price) -> list[Speed]:
    """The rows of the results files. Of the engine's benchmark those of one model: a small one says nothing of a large.

    Raises:
        InputError: as `read_speeds`; there are several models and none is named, or not the named one.
    """
    speeds = [speed for path in arguments.results for speed in read_speeds(path, price, arguments.speed_ratio)]
    wanted, models = arguments.results_model, sorted({speed.model for speed in speeds} - set(SUBJECTS))
    names = "; ".join(models) or "none"
    if wanted is None and len(models) > 1:
        raise InputError(f"--results: the files have rows of several models; name one with --results-model: {names}")
    if wanted is not None and wanted not in models:
        raise InputError(f"--results-model {wanted}: no rows of it in the results files; there are: {names}")
    return [speed for speed in speeds if speed.model in SUBJECTS or speed.model == wanted or wanted is None]


def rates(recipe: Recipe, arguments: argparse.Namespace, price: Price, speeds: Sequence[Speed]) -> Rates:
    """Of each stage: the command line's, or else a results file's."""
    batch = recipe.collect.batch_size
    return Rates(
        train=training_rate(recipe, arguments, price),
        collect=known(given(arguments, "collect") or collection_rate(speeds, batch), "collect"),
        evaluate=known(given(arguments, "evaluate") or evaluation_rate(speeds, recipe.evaluate.batch_size), "evaluate"),
        timing=known(given(arguments, "timing") or timing_rate(speeds), "timing"),
    )


def training_rate(recipe: Recipe, arguments: argparse.Namespace, price: Price) -> Rate:
    rate = given(arguments, "train")
    if rate is not None:
        return rate
    if arguments.train_mfu is None or arguments.parameters is None:
        raise InputError("training: no speed known; give --train-tokens-per-s, or --train-mfu and --parameters")
    if recipe.train.loss.on_policy_iterations:
        raise InputError(
            "--train-mfu: says nothing of the passes that train.loss.on_policy_iterations adds; give "
            "--train-tokens-per-s"
        )
    return train_rate(price, mfu=arguments.train_mfu, parameters=arguments.parameters)


def given(arguments: argparse.Namespace, stage: str) -> Rate | None:
    """The speed on the command line, if there is one."""
    value = getattr(arguments, f"{stage}_tokens_per_s")
    return None if value is None else Rate(value, "assumed", f"--{stage}-tokens-per-s")


def known(rate: Rate | None, stage: str) -> Rate:
    if rate is None:
        raise InputError(f"{stage}: no speed in the results files; give --{stage}-tokens-per-s")
    return rate


if __name__ == "__main__":
    sys.exit(main(run, __doc__, add_arguments=add_arguments))
