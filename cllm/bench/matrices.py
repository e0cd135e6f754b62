"""Matrix recipes by name."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from cllm.bench.matrix import LoadConfig, MatrixRecipe, RunConfig
from cllm.bench.methods import (
    ArMethod,
    JacobiMethod,
    LookaheadMethod,
    MethodConfig,
    TransformersMethod,
    VllmMethod,
)
from cllm.errors import InputError


def demo() -> MatrixRecipe:
    """Teacher and CLLM of `make demo` on two CPU cores, in less than a quarter of an hour."""
    return MatrixRecipe(
        name="demo",
        output="runs/demo/benchmark",
        runs=(RunConfig(recipe="demo"),),
        methods=(*_own_methods(16), TransformersMethod()),
        concurrencies=(1, 4),
        load=LoadConfig(num_prompts=160, speed_prompts=32),
    )


def debug() -> MatrixRecipe:
    """The smallest matrix, on the run of the recipe `debug`. For tests."""
    return MatrixRecipe(
        name="debug",
        output="runs/debug/benchmark",
        runs=(RunConfig(recipe="debug"),),
        methods=(ArMethod(), JacobiMethod(window=4, refill="block"), JacobiMethod(window=4), LookaheadMethod()),
        concurrencies=(1, 2),
        load=LoadConfig(num_prompts=4, speed_prompts=2, max_new_tokens=12),
        threads=1,
    )


def small() -> MatrixRecipe:
    """The small runs on real data, against vLLM, at up to 128 requests in flight on one GPU."""
    peers = (
        VllmMethod(),
        VllmMethod(method="ngram", guesses=5),
        VllmMethod(method="suffix", guesses=15),
        VllmMethod(method="jacobi", guesses=15),
    )
    return MatrixRecipe(
        name="small",
        output="runs/small-benchmark",
        runs=(RunConfig(recipe="gsm8k-small"), RunConfig(recipe="spider-small")),
        methods=(*_own_methods(16), TransformersMethod(), *peers),
        concurrencies=(1, 4, 16, 64, 128),
        load=LoadConfig(num_prompts=500, speed_prompts=256),
        gpus=1,
    )


MATRICES: Mapping[str, Callable[[], MatrixRecipe]] = MappingProxyType({"demo": demo, "debug": debug, "small": small})


def get_matrix(name: str) -> MatrixRecipe:
    """Build the matrix recipe called `name`.

    Raises:
        InputError: no such recipe; the known names are listed.
    """
    if name not in MATRICES:
        raise InputError(f"--matrix {name}: unknown; known are {', '.join(MATRICES)}")
    return MATRICES[name]()


def _own_methods(window: int) -> tuple[MethodConfig, ...]:
    """AR, and every way in which we decode by Jacobi iteration."""
    return (
        ArMethod(),
        JacobiMethod(window=window, refill="block"),
        JacobiMethod(window=window),
        JacobiMethod(window=window, policy="adaptive"),
        JacobiMethod(window=window, ngram=3),
        JacobiMethod(window=window, policy="adaptive", ngram=3),
        LookaheadMethod(),
    )
