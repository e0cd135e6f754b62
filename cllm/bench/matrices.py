"""Matrix recipes by name."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from cllm.bench.drafts import RUN_DRAFT
from cllm.bench.matrix import Crowd, LoadConfig, MatrixRecipe, RunConfig
from cllm.bench.methods import (
    ArMethod,
    JacobiMethod,
    LookaheadMethod,
    MethodConfig,
    TransformersMethod,
    VllmMethod,
)
from cllm.config import build_named
from cllm.evaluation.corpora import CorpusConfig
from cllm.tasks.humaneval import HumanEvalConfig
from cllm.tasks.mt_bench import MtBenchConfig
from cllm.tasks.spec_bench import SpecBenchConfig
from cllm.vllm.config import JacobiOptions


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
    """The small runs on real data, against vLLM without a draft, at up to 128 requests in flight on one GPU."""
    return MatrixRecipe(
        name="small",
        output="runs/small-benchmark",
        runs=_SMALL_RUNS,
        methods=(*_own_methods(16), TransformersMethod(), *_vllm_methods(drafts=False)),
        concurrencies=(1, 4, 16, 64, 128),
        load=LoadConfig(num_prompts=500, speed_prompts=256),
        gpus=1,
    )


def peers() -> MatrixRecipe:
    """The small runs against everything that vLLM has, trained draft model and heads included, on one GPU.

    Beforehand: jobs/pipeline.py and jobs/baselines.py for both runs. What a run lacks is listed and left out.
    """
    sliding, adaptive = JacobiMethod(window=16), JacobiMethod(window=16, policy="adaptive")
    vllm_ar, *others, vllm_jacobi = _vllm_methods(drafts=True)
    crowded = tuple(method.label for method in (ArMethod(), adaptive, vllm_ar, vllm_jacobi))
    return MatrixRecipe(
        name="peers",
        output="runs/peers",
        runs=_SMALL_RUNS,
        methods=(ArMethod(), sliding, adaptive, LookaheadMethod(), vllm_ar, *others, vllm_jacobi),
        concurrencies=(1, 8, 32),
        crowds=(Crowd(concurrency=128, methods=crowded),),
        load=LoadConfig(num_prompts=256, speed_prompts=128),
        gpus=1,
    )


def paper() -> MatrixRecipe:
    """The paper's tables: its four runs at 7B, one request in flight, AR by transformers and by us, both widths n.

    The run on CodeSearchNet answers HumanEval as well, the one on ShareGPT MT-bench (`jobs/judge.py` rates it) and
    Spec-Bench. Spec-Bench and the corpora are read from folders below data/.
    """
    sharegpt, codesearchnet = "paper-sharegpt", "paper-codesearchnet"
    blocks = tuple(JacobiMethod(window=window, refill="block", guess="prompt") for window in (16, 32))
    sliding = tuple(JacobiMethod(window=window, guess="prompt") for window in (16, 32))
    return MatrixRecipe(
        name="paper",
        output="runs/paper-benchmark",
        runs=(
            RunConfig(recipe="paper-gsm8k"),
            RunConfig(recipe="paper-spider"),
            RunConfig(recipe=codesearchnet),
            RunConfig(recipe=codesearchnet, test=HumanEvalConfig(source="openai/openai_humaneval")),
            RunConfig(recipe=sharegpt, test=MtBenchConfig()),
            RunConfig(recipe=sharegpt, test=SpecBenchConfig(source="data/spec_bench"), max_prompt_tokens=2048),
        ),
        methods=(
            ArMethod(),
            TransformersMethod(),
            *blocks,
            *sliding,
            LookaheadMethod(),
            VllmMethod(),
            VllmMethod(method="draft_model", guesses=5, draft=RUN_DRAFT),
            VllmMethod(method="medusa", guesses=4, draft=RUN_DRAFT),
        ),
        corpora=(CorpusConfig(name="wikitext2", path="data/wikitext2"), CorpusConfig(name="ptb", path="data/ptb")),
        load=LoadConfig(num_prompts=500, speed_prompts=80),
        gpus=4,
    )


MATRICES: Mapping[str, Callable[[], MatrixRecipe]] = MappingProxyType(
    {"demo": demo, "debug": debug, "small": small, "peers": peers, "paper": paper}
)
_SMALL_RUNS = (RunConfig(recipe="gsm8k-small"), RunConfig(recipe="spider-small"))


def get_matrix(name: str) -> MatrixRecipe:
    """Build the matrix recipe called `name`.

    Raises:
        InputError: no such recipe; the known names are listed.
    """
    return build_named(MATRICES, name, "matrix")


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


def _vllm_methods(*, drafts: bool) -> tuple[VllmMethod, ...]:
    """vLLM's AR decoding, its speculative methods, with the drafts that a run has trained or without, and Jacobi."""
    trained = (
        VllmMethod(method="draft_model", guesses=5, draft=RUN_DRAFT),
        VllmMethod(method="medusa", guesses=4, draft=RUN_DRAFT),
    )
    return (
        VllmMethod(),
        VllmMethod(method="ngram", guesses=5),
        *(trained if drafts else ()),
        VllmMethod(method="suffix", guesses=15),
        VllmMethod(method="jacobi", guesses=15, jacobi=JacobiOptions(guess="pad")),  # as these runs' CLLMs learnt it
    )
