"""What the cells of a run decode: how many tokens an answer may have, and how they are drawn.

A run's own prompts are answered as its evaluation answers them: in the paper's recipes that is 512 new tokens, greedily
(the authors' code). Other test sets have makers, whose scripts say how long an answer may be:

- HumanEval: 512 new tokens, as the authors' code gives all tasks; the paper's pass@1 is one greedy answer.
- MT-bench: 1,024 in FastChat's script. That draws some categories at a temperature; the paper's decoding is greedy.
- Spec-Bench: 1,024 in its own script, greedily.
"""

from collections.abc import Mapping
from types import MappingProxyType

from cllm.bench.matrix import LoadConfig, RunConfig
from cllm.recipe import Recipe

NEW_TOKENS: Mapping[str, int] = MappingProxyType({"humaneval": 512, "mt_bench": 1024, "spec_bench": 1024})


def load_of(matrix_load: LoadConfig, run: RunConfig, recipe: Recipe) -> LoadConfig:
    """The load with nothing left open: the entry of the matrix decides, else the matrix, else the test set."""
    theirs = NEW_TOKENS.get(run.test.name) if run.test else None
    open_load = {
        "max_new_tokens": run.max_new_tokens or matrix_load.max_new_tokens or theirs or recipe.evaluate.max_new_tokens,
        "temperature": matrix_load.temperature if run.temperature is None else run.temperature,
        "top_p": run.top_p or matrix_load.top_p,
    }
    return matrix_load.model_copy(update=open_load)
