"""Runs with tiny random models whose responses can be scored, and matrices over them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from cllm.bench.matrices import get_matrix
from cllm.bench.matrix import MatrixRecipe
from cllm.layout import RunLayout
from cllm.models import load_tokenizer
from cllm.recipe import Recipe
from cllm.tasks.prompts import read_metadata, read_prompts, tokenizer_hash, write_prompts
from cllm.tasks.registry import load_task
from tests.evaluation.runs import make_run

CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
CHATS = (
    {"question_id": 1, "category": "math", "turns": ["How many?", "Why?"], "reference": ["2", "3"]},
    {"question_id": 2, "category": "stem", "turns": ["What is a cell?", "Which other?"]},
    {"question_id": 3, "category": "writing", "turns": ["Write a line.", "Now another."]},
)


def make_scored_run(folder: Path) -> Recipe:
    """Both models, and prompts whose databases exist."""
    recipe = make_run(folder).with_overrides([f"task.databases={folder / 'databases'}"])
    load_task(recipe.task).score([], [], [])  # makes the databases
    database = str(min((folder / "databases").glob("*.sqlite")))
    path = RunLayout.of(recipe).prompts_file
    prompts = [replace(prompt, context={"database": database}) for prompt in read_prompts(path)]
    write_prompts(path, prompts, {"tokenizer_hash": read_metadata(path)["tokenizer_hash"]})
    return recipe


def make_chat_run(folder: Path) -> Recipe:
    """The same run with a chat template."""
    recipe = make_run(folder).with_overrides(["prompts.template=chat"])
    layout = RunLayout.of(recipe)
    tokenizer = load_tokenizer(str(layout.tokenizer))
    tokenizer.chat_template = CHAT_TEMPLATE
    for place in (layout.tokenizer, layout.finetuned, layout.student):
        tokenizer.save_pretrained(place)
    write_prompts(layout.prompts_file, read_prompts(layout.prompts_file), {"tokenizer_hash": tokenizer_hash(tokenizer)})
    return recipe


def write_questions(folder: Path, rows: Sequence[Mapping[str, object]]) -> str:
    """A folder as MT-bench and Spec-Bench come in; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "question.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


def matrix_over(recipe: Recipe, output: Path, **changed: object) -> MatrixRecipe:
    """The debug matrix over a run."""
    data = get_matrix("debug").model_dump()
    data |= {"output": str(output), "runs": [run_of(recipe)], **changed}
    return MatrixRecipe.from_data(data, where="test")


def run_of(recipe: Recipe, **more: object) -> dict[str, object]:
    """The entry of a run in a matrix."""
    databases, template = recipe.task.databases, recipe.prompts.template  # type: ignore[union-attr]
    overrides = (f"output={recipe.output}", f"task.databases={databases}", f"prompts.template={template}")
    return {"recipe": "debug", "overrides": overrides, **more}
