"""Hours and dollars of a run on rented machines: each stage's tokens over a speed, times the price of the machines.

A machine is paid whole, whether or not all its GPUs work. Not counted: preparing prompts (minutes on the head node),
scoring, moving data, storage, and work that is repeated because a spot machine was taken away.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cllm.errors import InputError
from cllm.evaluation.decode import methods
from cllm.evaluation.subject import SUBJECTS
from cllm.recipe import OptimConfig, Recipe
from cllm.report.prices import Price
from cllm.report.speeds import Rate
from cllm.report.tables import markdown_table
from cllm.training.throughput import PEAK_FLOPS

_FLOPS_PER_PARAMETER = 6  # a token's forward and backward pass, attention left out, as MFU is counted


@dataclass(frozen=True, slots=True)
class Rates:
    """Speeds of one GPU (or machine without GPUs) in tokens a second.

    Attributes:
        train: tokens of packed rows in training, of the teacher as of the student.
        collect: response tokens of block decoding that records trajectories.
        evaluate: response tokens of a decoding batch, all decoders alike.
        timing: response tokens, one prompt at a time.
    """

    train: Rate
    collect: Rate
    evaluate: Rate
    timing: Rate


@dataclass(frozen=True, slots=True)
class Work:
    """One stage: its tokens, and the GPUs (or machines) that share them."""

    stage: str
    tokens: float
    devices: int
    rate: Rate


@dataclass(frozen=True, slots=True)
class StageCost:
    """One line of an estimate; `rate` and `tokens` are None for what takes a time of its own."""

    stage: str
    tokens: float | None
    devices: int
    rate: Rate | None
    instances: int
    hours: float
    dollars: float


def stages_of(recipe: Recipe, rates: Rates, *, response_tokens: float, num_prompts: int | None = None) -> list[Work]:
    """What a recipe does, in tokens.

    Args:
        response_tokens: mean length of a response.
        num_prompts: prompts of the train split, for a recipe that collects from all of them.

    Raises:
        InputError: a length or number that is not positive, or the number of prompts is not known.
    """
    if not response_tokens > 0:
        raise InputError(f"--response-tokens: must be positive, got {response_tokens:g}")
    prompts = recipe.collect.num_prompts or num_prompts
    if prompts is None or prompts < 1:
        raise InputError("--prompts: the recipe collects from all train prompts; give their number (at least 1)")
    devices = max(1, recipe.resources.gpus)
    decoders = len(SUBJECTS) * len(methods(recipe.evaluate.block_size))
    evaluated, timed = recipe.evaluate.num_prompts, recipe.evaluate.speed_prompts * recipe.evaluate.speed_repeats
    work = [] if recipe.finetune is None else [Work("finetune", _rows(recipe.finetune.optim), devices, rates.train)]
    return [
        *work,
        Work("collect", prompts * response_tokens, devices, rates.collect),
        Work("train", _rows(recipe.train.optim), devices, rates.train),
        Work("evaluate: decode", evaluated * response_tokens * decoders, devices, rates.evaluate),
        Work("evaluate: time", timed * response_tokens * decoders, 1, rates.timing),
    ]


def train_rate(price: Price, *, mfu: float, parameters: float) -> Rate:
    """Training speed of one GPU that an assumed share of its peak gives.

    Raises:
        InputError: a share outside (0, 1], no parameters, or a GPU whose peak is not known.
    """
    if not 0 < mfu <= 1:
        raise InputError(f"--train-mfu: must be above 0 and at most 1, got {mfu:g}")
    if not parameters > 0:
        raise InputError(f"--parameters: must be positive, got {parameters:g}")
    if price.gpu not in PEAK_FLOPS:
        raise InputError(f"--train-mfu: the peak of {price.gpu or 'a CPU'} is not known; give --train-tokens-per-s")
    tokens_per_s = mfu * PEAK_FLOPS[price.gpu] / (_FLOPS_PER_PARAMETER * parameters)
    return Rate(tokens_per_s, "assumed", f"{parameters:.3g} parameters at {mfu:.0%} of the peak")


def stage_cost(work: Work, price: Price) -> StageCost:
    """Hours and dollars of one stage."""
    hours = work.tokens / (work.rate.tokens_per_s * work.devices) / 3600
    instances = math.ceil(work.devices / price.devices)
    dollars = hours * instances * price.dollars_per_hour
    return StageCost(work.stage, work.tokens, work.devices, work.rate, instances, hours, dollars)


def estimate(
    work: Sequence[Work], price: Price, *, startup_hours: float, head_dollars_per_hour: float = 0.0
) -> list[StageCost]:
    """All stages, with the time in which the machines start before them and the head node that runs beside them.

    Raises:
        InputError: a negative time or price.
    """
    for name, value in (("--startup-minutes", startup_hours), ("--head-dollars-per-hour", head_dollars_per_hour)):
        if not value >= 0:
            raise InputError(f"{name}: must not be negative")
    costs = [stage_cost(part, price) for part in work]
    instances, devices = max(cost.instances for cost in costs), max(cost.devices for cost in costs)
    dollars = startup_hours * instances * price.dollars_per_hour
    costs = [StageCost("start-up", None, devices, None, instances, startup_hours, dollars), *costs]
    hours = sum(cost.hours for cost in costs)
    head = StageCost("head node", None, 0, None, 1, 0.0, hours * head_dollars_per_hour)
    return [*costs, head] if head_dollars_per_hour else costs


def dollars_per_million_tokens(rate: Rate, price: Price) -> float:
    """Of serving, with a replica on every GPU and all of them busy."""
    return price.dollars_per_hour / (rate.tokens_per_s * price.devices * 3600) * 1e6


def costs_document(costs: Sequence[StageCost], price: Price) -> dict[str, Any]:
    """Plain data; the sums are over all stages."""
    return {
        "price": asdict(price),
        "stages": [asdict(cost) for cost in costs],
        "hours": sum(cost.hours for cost in costs),
        "dollars": sum(cost.dollars for cost in costs),
    }


def costs_table(costs: Sequence[StageCost], price: Price) -> str:
    """Markdown, with the sum and where every figure is from."""
    figures = ("tokens", "GPUs", "tokens/s a GPU", "machines", "hours", "dollars")
    hours, dollars = sum(cost.hours for cost in costs), sum(cost.dollars for cost in costs)
    total = ("sum", "", "", "", "", f"{hours:.2f}", f"{dollars:,.2f}")
    table = markdown_table(("stage", *figures), [*map(_cells, costs), total], figures)
    bases = [f"- {cost.stage}: {_basis(cost)}" for cost in costs if cost.tokens is not None]
    return "\n".join([table, "", _price_line(price), *bases])


def _rows(optim: OptimConfig) -> int:
    """Tokens of all packed rows that the optimiser sees."""
    return optim.steps * optim.rows_per_step * optim.row_tokens


def _cells(cost: StageCost) -> tuple[str, ...]:
    tokens = "" if cost.tokens is None else f"{cost.tokens:,.0f}"
    rate = "" if cost.rate is None else f"{cost.rate.tokens_per_s:,.0f}"
    devices = str(cost.devices) if cost.devices else ""
    return (cost.stage, tokens, devices, rate, str(cost.instances), f"{cost.hours:.2f}", f"{cost.dollars:,.2f}")


def _basis(cost: StageCost) -> str:
    return "" if cost.rate is None else f"{cost.rate.basis} ({cost.rate.source})"


def _price_line(price: Price) -> str:
    return (
        f"{price.instance}: ${price.dollars_per_hour:,.2f} an hour, {price.gpus} × {price.gpu or 'no GPU'}; "
        f"{price.source}, {price.date}"
    )
