"""Grids by name."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from cllm.ablation.grid import Factor, Grid, Level, Setting
from cllm.bench.matrix import RunConfig
from cllm.config import build_named

_PAPER_STATES = ("train.loss.states=trajectory", "train.loss.on_policy_iterations=0")
_OWN_STATES = ("train.loss.states=guess", "train.loss.on_policy_iterations=2")


def demo() -> Grid:
    """39 students of the run of `make demo`, 360 steps each: about an hour on two CPU cores.

    The centre trains on recorded states, as the paper does, because the demo's own states (the student's iterations)
    know neither a local loss nor a noisy context; they are a level of the factor `states`. Without weights there is no
    decoding with another n: nine students are decoded so when they are made, or are made again for it.
    """
    return Grid(
        name="demo",
        output="runs/demo/ablation",
        base=RunConfig(recipe="demo"),
        centre=("collect.record=true", "train.optim.steps=360", "evaluate.num_prompts=300"),
        factors=_factors(num_prompts=1800, ar_weights=(2.5, 10.0, 1.0, 0.0)),
        table=("data", "n"),
        windows=(8, 16, 32),
    )


def small() -> Grid:
    """39 students of gsm8k-small, 33M parameters, 300 steps each: for half an hour of one H200. Not run yet."""
    return Grid(
        name="small",
        output="runs/gsm8k-small/ablation",
        base=RunConfig(recipe="gsm8k-small"),
        centre=("collect.record=true", "collect.samples=1", "train.optim.steps=300", "evaluate.num_prompts=500"),
        factors=_factors(num_prompts=3000, ar_weights=(1.5, 10.0, 4.0, 0.0)),
        table=("data", "n"),
        windows=(8, 16, 32),
        gpus=1,
    )


def debug() -> Grid:
    """The smallest grid, on the run of the recipe `debug`: four students. For tests."""
    return Grid(
        name="debug",
        output="runs/debug/ablation",
        base=RunConfig(recipe="debug"),
        factors=(_data(48, (1.0, 0.25)), _block_size((8, 4))),
        table=("data", "n"),
        windows=(8, 4),
        seeds=(0,),
    )


GRIDS: Mapping[str, Callable[[], Grid]] = MappingProxyType({"demo": demo, "small": small, "debug": debug})


def get_grid(name: str) -> Grid:
    """Build the grid called `name`.

    Raises:
        InputError: no such grid; the known names are listed.
    """
    return build_named(GRIDS, name, "grid")


def _factors(num_prompts: int, ar_weights: tuple[float, ...]) -> tuple[Factor, ...]:
    return (
        _data(num_prompts, (1.0, 0.25, 0.0625), crossed=True),
        _block_size((16, 8, 32), crossed=True),
        _plain("ar_weight", "train.loss.ar_weight", ar_weights, crossed=True),
        _plain("context", "train.loss.context", ("clean", "noisy"), crossed=True),
        _plain("loss", "train.loss.target", ("global", "local"), crossed=True),
        _plain("divergence", "train.loss.divergence", ("forward_kl", "reverse_kl", "jsd")),
        Factor(
            name="states",
            levels=(
                Level(value="recorded", overrides=_PAPER_STATES),
                Level(value="on-policy", overrides=_OWN_STATES),
            ),
        ),
    )


def _data(num_prompts: int, shares: tuple[float, ...], *, crossed: bool = False) -> Factor:
    """Shares of the first `num_prompts` prompts to collect from."""
    levels = [Level(value=s, overrides=(f"collect.num_prompts={round(s * num_prompts)}",)) for s in shares]
    return Factor(name="data", levels=tuple(levels), crossed=crossed)


def _block_size(sizes: tuple[int, ...], *, crossed: bool = False) -> Factor:
    levels = [Level(value=n, overrides=(f"collect.block_size={n}", f"evaluate.block_size={n}")) for n in sizes]
    return Factor(name="n", levels=tuple(levels), crossed=crossed)


def _plain(name: str, key: str, values: tuple[Setting, ...], *, crossed: bool = False) -> Factor:
    levels = tuple(Level(value=value, overrides=(f"{key}={value}",)) for value in values)
    return Factor(name=name, levels=levels, crossed=crossed)
