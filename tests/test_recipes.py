"""Every recipe builds, reads back from JSON, and names what is wrong with an override."""

import json

import pytest

from cllm.errors import InputError
from cllm.recipe import Recipe, ResourceConfig
from cllm.recipes import get_recipe, recipe_names

# Block size and number of prompts.
PAPER = {
    "paper-gsm8k": (16, 7_000),
    "paper-spider": (16, 7_000),
    "paper-codesearchnet": (32, 50_000),
    "paper-sharegpt": (32, 48_000),
}
RECORDED = ("collect.record=true", "train.loss.states=trajectory", "train.loss.on_policy_iterations=0")


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
    assert (recipe.collect.block_size, recipe.collect.num_prompts) == PAPER[name]
    assert recipe.evaluate.block_size == recipe.collect.block_size
    assert (recipe.collect.guess, recipe.evaluate.guess) == ("prompt", "prompt")
    assert (recipe.collect.samples, recipe.collect.augment) == (1, 0.0)  # greedy trajectories, as they are
    optim = recipe.train.optim
    assert (optim.learning_rate, optim.warmup_ratio, optim.weight_decay) == (2e-5, 0.03, 0.0)
    loss = recipe.train.loss
    assert (loss.target, loss.divergence, loss.ar_weight) == ("global", "forward_kl", 10.0)
    assert (loss.states, loss.context, loss.schedule, loss.states_per_block) == ("trajectory", "clean", "random", 1)
    assert (loss.ar_labels, loss.on_policy_iterations) == ("teacher", 0)
    assert recipe.train.gradient_checkpointing
    assert recipe.resources.gpus == optim.rows_per_step == 4  # one row a GPU


@pytest.mark.parametrize("name", sorted(PAPER))
def test_paper_recipes_train_what_the_paper_compares_with(name: str) -> None:
    recipe = get_recipe(name)
    assert recipe.baselines is not None
    draft, medusa = recipe.baselines.draft, recipe.baselines.medusa
    assert draft is not None
    assert draft.scratch is not None
    layer = 4 * draft.scratch.hidden_size**2 + 3 * draft.scratch.hidden_size * draft.scratch.intermediate_size
    parameters = draft.scratch.num_layers * layer + 2 * 32_000 * draft.scratch.hidden_size
    assert parameters == pytest.approx(160e6, rel=0.02)  # with LLaMA's vocabulary
    assert medusa is not None
    assert medusa.variant == 2
    assert draft.optim.steps == medusa.optim.steps == recipe.train.optim.steps


@pytest.mark.parametrize("name", sorted(PAPER))
def test_seven_billion_parameters_fit_in_training(name: str) -> None:
    """On 40 GB, which activations of 2,048 tokens would not leave free."""
    recipe = get_recipe(name)
    assert recipe.baselines is not None
    assert recipe.baselines.medusa is not None
    assert recipe.baselines.medusa.gradient_checkpointing
    assert recipe.finetune is None or recipe.finetune.gradient_checkpointing


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
        ("finetune.lora={}", r"finetune\.lora adapts a trained model"),
        ("train.patience=0", r"train\.patience: .*greater than or equal to 1"),
        ("train.validate_every=0", r"train\.validate_every: .*greater than or equal to 1"),
        ("finetune.optim.accumulation=3", r"finetune\.optim\.rows_per_step=4 is no multiple of .*accumulation=3 x 1"),
        ("train.loss.schedule_window=8", "schedule_window=8 has no effect with context=clean and schedule=random"),
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


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.loss.target=local"], "target=local has no effect with states=guess"),
        (["train.loss.context=noisy"], "context=noisy has no effect with states=guess"),
        (["train.loss.schedule=progressive"], "schedule=progressive has no effect with states=guess"),
        (["collect.augment=0.5"], r"collect\.augment=0\.5 has no effect with train\.loss\.states=guess"),
        ([*RECORDED[:2], "train.loss.target=local"], "target=local .* on_policy_iterations"),
        (["train.loss.states=trajectory"], r"states=trajectory .* collect\.record=false"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(overrides: list[str], message: str) -> None:
    """The demo trains on guesses and the student's own iterations."""
    with pytest.raises(InputError, match=message):
        get_recipe("demo").with_overrides(overrides)


@pytest.mark.parametrize(
    "override",
    [
        "train.loss.target=local",
        "train.loss.context=noisy",
        "train.loss.schedule=progressive",
        'train.loss={"context": "noisy", "schedule_window": 2}',
        "collect.augment=0.5",
    ],
)
def test_recorded_states_know_all_of_them(override: str) -> None:
    recipe = get_recipe("demo").with_overrides([*RECORDED])
    assert recipe.with_overrides([override]).fingerprint() != recipe.fingerprint()


def test_patience_counts_validations() -> None:
    with pytest.raises(InputError, match="patience=2 counts validations: set validate_every"):
        get_recipe("demo").with_overrides(["train.patience=2"])


def test_rows_of_a_step_are_shared_by_the_workers() -> None:
    """Six GPUs cannot share the four rows of the paper's step, nor three the eight of the small recipes."""
    with pytest.raises(InputError, match=r"finetune\.optim\.rows_per_step=8 is no multiple .* 3 workers"):
        get_recipe("gsm8k-small").with_overrides(["resources.gpus=3"])
    paper = get_recipe("paper-gsm8k").with_overrides(["resources.gpus=2", "train.optim.accumulation=2"])
    assert paper.train.optim.accumulation == 2
    with pytest.raises(InputError, match=r"train\.optim\.rows_per_step=4 is no multiple .* 6 workers"):
        paper.with_overrides(["resources.gpus=6"])
    # Nobody need think of the baselines' rows who does not train them.
    get_recipe("paper-gsm8k").with_overrides(["resources.gpus=8", "train.optim.rows_per_step=8"])


@pytest.mark.parametrize("key", ["finetune.gradient_checkpointing=true", 'finetune.lora={"rank": 4}'])
def test_later_keys_leave_the_fingerprints_of_earlier_teachers(key: str) -> None:
    finetune = get_recipe("paper-spider").with_overrides(["finetune.gradient_checkpointing=false"]).finetune
    assert finetune is not None
    assert finetune.model_dump(mode="json").keys() == {"optim", "precision", "validate_every"}
    recipe = get_recipe("paper-spider").with_overrides([key])
    assert recipe.finetune is not None
    assert recipe.finetune.fingerprint() != finetune.fingerprint()
    assert Recipe.from_data(json.loads(recipe.model_dump_json()), where="run.json") == recipe


@pytest.mark.parametrize("section", ["finetune", "train"])
def test_muon_on_several_gpus_is_refused(section: str) -> None:
    one = get_recipe("debug").with_overrides([f"{section}.optim.optimizer=muon", "resources.gpus=1"])
    with pytest.raises(InputError, match=rf"{section}\.optim\.optimizer=muon .*resources\.gpus=2"):
        one.with_overrides(["resources.gpus=2"])


@pytest.mark.parametrize("section", ["finetune", "train"])
def test_muon_on_several_workers_is_refused(section: str) -> None:
    with pytest.raises(InputError, match=rf"{section}\.optim\.optimizer=muon .*resources\.workers=2"):
        get_recipe("debug").with_overrides([f"{section}.optim.optimizer=muon", "resources.workers=2"])


def test_workers_are_those_of_cpus_or_one_a_gpu() -> None:
    counts = [ResourceConfig(**asked).training_workers for asked in ({}, {"gpus": 4}, {"workers": 3})]
    assert counts == [1, 4, 3]
    with pytest.raises(InputError, match="workers=2 is for CPUs; gpus=4 makes one worker a GPU"):
        get_recipe("debug").with_overrides(["resources.gpus=4", "resources.workers=2"])


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
