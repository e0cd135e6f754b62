"""Every recipe builds, reads back from JSON, and names what is wrong with an override."""

import json

import pytest

from cllm.errors import InputError
from cllm.recipe import Recipe
from cllm.recipes import get_recipe, recipe_names

PAPER = {"paper-gsm8k": 16, "paper-spider": 16, "paper-codesearchnet": 32, "paper-sharegpt": 32}


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_builds_and_reads_back_from_json(name: str) -> None:
    recipe = get_recipe(name)
    assert recipe.name == name
    again = Recipe.from_data(json.loads(recipe.model_dump_json()), where="run.json")
    assert again == recipe
    assert again.fingerprint() == recipe.fingerprint()


@pytest.mark.parametrize("name", recipe_names())
def test_longest_document_fits_a_packed_row(name: str) -> None:
    """A prompt with its response that is longer would be left out of training (spans that do not fit are dropped)."""
    recipe = get_recipe(name)
    assert recipe.prompts.max_prompt_tokens + recipe.collect.max_new_tokens <= recipe.train.optim.row_tokens
    if recipe.finetune is not None:
        longest = recipe.prompts.max_prompt_tokens + recipe.prompts.max_response_tokens
        assert longest <= recipe.finetune.optim.row_tokens


def test_recipes_write_to_folders_of_their_own() -> None:
    outputs = [get_recipe(name).output for name in recipe_names()]
    assert len(set(outputs)) == len(outputs)


@pytest.mark.parametrize("name", sorted(PAPER))
def test_paper_recipes_hold_the_papers_settings(name: str) -> None:
    recipe = get_recipe(name)
    assert recipe.collect.block_size == recipe.evaluate.block_size == PAPER[name]
    optim = recipe.train.optim
    assert (optim.learning_rate, optim.warmup_ratio, optim.weight_decay) == (2e-5, 0.03, 0.0)
    assert recipe.train.loss.ar_weight == 10.0
    assert recipe.train.gradient_checkpointing


def test_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"nosuch: unknown; known are debug, .*paper-gsm8k"):
        get_recipe("nosuch")


def test_overrides_reach_nested_sections_with_their_types() -> None:
    changed = get_recipe("debug").with_overrides(
        ["train.optim.steps=7", "train.loss.target=local", "output=/tmp/x", "collect.max_token_repeat=null"]
    )
    assert (changed.train.optim.steps, changed.train.loss.target) == (7, "local")
    assert (changed.output, changed.collect.max_token_repeat) == ("/tmp/x", None)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.optim.stepz=7", "unknown key 'stepz'"),
        ("distil.steps=7", "no section named 'distil'"),
        ("train.optim.steps=many", r"train\.optim\.steps: .*'many'"),
        ("train.loss.target=nearby", r"train\.loss\.target: .*'nearby'"),
        ("task.name=nosuch", r"task: .*nosuch"),
        ("finetune=null", "a teacher from scratch needs a finetune section"),
        ("teacher.path=/models/x", "give exactly one of path and scratch"),
        (
            "collect.max_new_tokens=257",
            r"max_prompt_tokens=256 \+ collect\.max_new_tokens=257 .* teacher\.scratch\.max_positions=512",
        ),
        (
            "evaluate.max_new_tokens=257",
            r"max_prompt_tokens=256 \+ evaluate\.max_new_tokens=257 .* teacher\.scratch\.max_positions=512",
        ),
    ],
)
def test_bad_override_names_the_key(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        get_recipe("debug").with_overrides([override])


@pytest.mark.parametrize("section", ["finetune", "train"])
def test_muon_on_several_gpus_is_refused(section: str) -> None:
    one = get_recipe("debug").with_overrides([f"{section}.optim.optimizer=muon", "resources.gpus=1"])
    with pytest.raises(InputError, match=rf"{section}\.optim\.optimizer=muon .*resources\.gpus=2"):
        one.with_overrides(["resources.gpus=2"])


def test_databases_follow_the_output_unless_the_recipe_names_them() -> None:
    recipe = get_recipe("spider-small")
    assert recipe.placed_task == recipe.task.model_copy(update={"databases": "runs/spider-small/databases"})
    moved = recipe.with_overrides(["output=/shared/run"])
    assert moved.placed_task == recipe.task.model_copy(update={"databases": "/shared/run/databases"})
    named = moved.with_overrides(["task.databases=/data/built"])
    assert named.placed_task == named.task
    debug = get_recipe("debug")
    assert debug.placed_task is debug.task


def test_output_is_no_url():
    with pytest.raises(ValueError, match="output"):
        get_recipe("debug").with_overrides(["output=s3://bucket/run"])
