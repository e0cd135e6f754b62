"""A run with tiny random models whose responses can be scored, and a matrix over it."""

from dataclasses import replace
from pathlib import Path

from cllm.bench.matrices import get_matrix
from cllm.bench.matrix import MatrixRecipe
from cllm.layout import RunLayout
from cllm.recipe import Recipe
from cllm.tasks.prompts import read_metadata, read_prompts, write_prompts
from cllm.tasks.registry import load_task
from tests.evaluation.runs import make_run


def make_scored_run(folder: Path) -> Recipe:
    """Both models, and prompts whose databases exist."""
    recipe = make_run(folder).with_overrides([f"task.databases={folder / 'databases'}"])
    load_task(recipe.task).score([], [], [])  # makes the databases
    database = str(min((folder / "databases").glob("*.sqlite")))
    path = RunLayout.of(recipe).prompts_file
    prompts = [replace(prompt, context={"database": database}) for prompt in read_prompts(path)]
    write_prompts(path, prompts, {"tokenizer_hash": read_metadata(path)["tokenizer_hash"]})
    return recipe


def matrix_over(recipe: Recipe, output: Path, **changed: object) -> MatrixRecipe:
    """The debug matrix over a run."""
    overrides = (f"output={recipe.output}", f"task.databases={recipe.task.databases}")  # type: ignore[union-attr]
    data = get_matrix("debug").model_dump()
    data |= {"output": str(output), "runs": [{"recipe": "debug", "overrides": overrides}], **changed}
    return MatrixRecipe.from_data(data, where="test")
