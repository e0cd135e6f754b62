"""What a cell's key depends on, by changing what is on disk: the scorer, its databases and tests, tokens that end."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cllm.bench.loads import load_of
from cllm.bench.matrix import LoadConfig, Platform, RunConfig
from cllm.bench.plan import plan
from cllm.layout import RunLayout
from cllm.recipe import Recipe
from cllm.recipes import get_recipe
from tests.bench.runs import matrix_over, run_of

PLATFORM = Platform(device="cpu", threads=1, versions={"torch": "2.13"})
PROBLEM = {
    "task_id": "T/0",
    "prompt": "def one():\n",
    "entry_point": "one",
    "canonical_solution": "    return 1\n",
    "test": "def check(candidate):\n    assert candidate() == 1\n",
}


def keys(recipe: Recipe, output: Path, test: dict[str, Any] | None = None) -> set[str]:
    changed = {"runs": [run_of(recipe, test=test)], "methods": [{"kind": "ar"}], "concurrencies": [1]}
    found = plan(matrix_over(recipe, output, **changed), PLATFORM)
    assert found.cannot_run == ()
    return {cell.key for cell in found.cells}


@pytest.fixture
def moved(tiny_run: Recipe, tmp_path: Path) -> Recipe:
    """The run's own copy, which a test may change; its databases are where they were."""
    shutil.copytree(RunLayout.of(tiny_run).root, tmp_path / "run")
    return tiny_run.model_copy(update={"output": str(tmp_path / "run")})


def problems(folder: Path, **changed: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "HumanEval.jsonl").write_text(json.dumps(PROBLEM | changed))
    return str(folder)


def test_a_run_somewhere_else_is_the_same(tiny_run: Recipe, moved: Recipe, tmp_path: Path) -> None:
    assert keys(moved, tmp_path) == keys(tiny_run, tmp_path)


def test_limits_of_the_scorer(tiny_run: Recipe, tmp_path: Path) -> None:
    test = {"name": "humaneval", "source": problems(tmp_path / "a"), "seconds": 0.01}
    first = keys(tiny_run, tmp_path, test)
    assert keys(tiny_run, tmp_path, test | {"workers": 7, "source": problems(tmp_path / "b")}) == first
    assert keys(tiny_run, tmp_path, test | {"seconds": 5}).isdisjoint(first)


def test_corrected_tests(tiny_run: Recipe, tmp_path: Path) -> None:
    """The questions are the same, and so are the gold answers."""
    test = {"name": "humaneval", "source": problems(tmp_path / "a")}
    first = keys(tiny_run, tmp_path, test)
    problems(tmp_path / "a", test="def check(candidate):\n    assert candidate() == 2\n")
    assert keys(tiny_run, tmp_path, test).isdisjoint(first)


def test_contents_of_databases(tiny_run: Recipe, tmp_path: Path) -> None:
    first = keys(tiny_run, tmp_path)
    databases = sorted(Path(tiny_run.task.databases).glob("*.sqlite"))  # type: ignore[union-attr]
    before = databases[0].read_bytes()
    try:
        databases[0].write_bytes(before + b"\0" * 4096)
        assert keys(tiny_run, tmp_path).isdisjoint(first)
    finally:
        databases[0].write_bytes(before)


def test_tokens_that_end_a_response(moved: Recipe, tmp_path: Path) -> None:
    first = keys(moved, tmp_path)
    path = RunLayout.of(moved).finetuned / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [0, 5]}))
    assert len(keys(moved, tmp_path) & first) == 1  # the CLLM's


def test_answers_of_a_test_set_are_as_long_as_its_makers_have_them() -> None:
    recipe = get_recipe("debug")
    humaneval, mt_bench = ({"name": "humaneval", "source": "x"}, {"name": "mt_bench"})

    def longest(test: dict[str, str] | None, load: int | None = None, entry: int | None = None) -> int | None:
        run = RunConfig.model_validate({"recipe": "debug", "test": test, "max_new_tokens": entry})
        return load_of(LoadConfig(max_new_tokens=load), run, recipe).max_new_tokens

    assert longest(None) == recipe.evaluate.max_new_tokens
    assert (longest(humaneval), longest(mt_bench)) == (512, 1024)
    assert longest(mt_bench, load=64) == 64
    assert longest(mt_bench, load=64, entry=32) == 32


def test_an_entry_may_draw_as_it_likes() -> None:
    warm = LoadConfig(temperature=0.7, top_p=0.9)
    run = RunConfig(recipe="debug", temperature=0.0)
    found = load_of(warm, run, get_recipe("debug"))
    assert (found.temperature, found.top_p) == (0.0, 0.9)
