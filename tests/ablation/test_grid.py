"""Which students a grid stands for, and every mistake in it named before anything starts."""

from collections import Counter
from itertools import combinations

import pytest

from cllm.ablation.grid import Grid, decoded_further, students, title_of
from cllm.ablation.grids import GRIDS, get_grid
from cllm.errors import InputError
from cllm.recipes import get_recipe

LARGE = ("demo", "small")


def coded(grid: Grid) -> list[tuple[int, ...]]:
    """The two-level part of a grid: for each of its students the crossed factors, -1 at the centre and 1 changed."""
    crossed = [factor for factor in grid.factors if factor.crossed]
    others = {factor.name: factor.values[0] for factor in grid.factors if not factor.crossed}
    rows = []
    for student in students(grid):
        settings = student.settings
        plain = all(settings[name] == value for name, value in others.items())
        if plain and student.seed == grid.seeds[0] and all(settings[f.name] in f.values[:2] for f in crossed):
            rows.append(tuple(1 if settings[factor.name] == factor.values[1] else -1 for factor in crossed))
    return [row for row in rows if row.count(1) % 2 == 0]


@pytest.mark.parametrize("name", LARGE)
def test_grids_have_enough_students_with_distinct_settings(name: str) -> None:
    found = students(get_grid(name))
    assert len({tuple(student.settings.items()) for student in found}) >= 24
    assert len({(student.seed, student.recipe.fingerprint()) for student in found}) == len(found) == 39


@pytest.mark.parametrize("name", LARGE)
def test_the_crossing_confuses_no_effect_with_another(name: str) -> None:
    rows = coded(get_grid(name))
    assert len(rows) == len(set(rows)) == 16
    columns = list(zip(*rows, strict=True))
    pairs = [tuple(a * b for a, b in zip(*two, strict=True)) for two in combinations(columns, 2)]
    effects = [*columns, *pairs]
    assert all(sum(column) == 0 for column in effects)
    assert all(sum(a * b for a, b in zip(*two, strict=True)) == 0 for two in combinations(effects, 2))


@pytest.mark.parametrize("name", LARGE)
def test_every_level_is_crossed_or_has_two_seeds_and_is_there_alone(name: str) -> None:
    grid = get_grid(name)
    alone = Counter(title_of(grid, student.settings) for student in students(grid))
    assert alone["centre"] == len(grid.seeds)
    for factor in grid.factors:
        for index, value in enumerate(factor.values[1:], start=1):
            in_crossing = factor.crossed and index == 1
            assert alone[f"{factor.name}={value}"] == (1 if in_crossing else len(grid.seeds))


def test_settings_are_what_the_recipes_say() -> None:
    base = get_recipe("demo")
    for student in students(get_grid("demo")):
        recipe, settings = student.recipe, student.settings
        assert recipe.collect.block_size == recipe.evaluate.block_size == settings["n"]
        assert recipe.collect.num_prompts == round(1800 * float(settings["data"]))
        assert recipe.train.loss.ar_weight == settings["ar_weight"]
        assert (recipe.train.loss.context, recipe.train.loss.target) == (settings["context"], settings["loss"])
        assert recipe.train.loss.divergence == settings["divergence"]
        assert (recipe.train.validate_every, recipe.train.patience) == (None, None)
        assert (recipe.task.name, recipe.finetune, recipe.seed) == (base.task.name, base.finetune, base.seed)
        plain = base.with_overrides(student.overrides)
        assert (plain.train, plain.collect, plain.evaluate) == (recipe.train, recipe.collect, recipe.evaluate)


@pytest.mark.parametrize("name", LARGE)
def test_every_cell_of_the_table_has_a_student_and_three_decodings(name: str) -> None:
    """Of data and n all combinations, at the centre's other settings: nothing in the table is a sum of effects."""
    grid = get_grid(name)
    found = students(grid)
    data, n = grid.factors[:2]
    others = {factor.name: factor.values[0] for factor in grid.factors[2:]}
    mine = [s for s in found if s.seed == grid.seeds[0] and others.items() <= s.settings.items()]
    wanted = {(share, size) for share in data.values for size in n.values}
    assert sorted((s.settings["data"], s.settings["n"]) for s in mine) == sorted(wanted)
    decodings = {(s.settings["data"], s.settings["n"], s.window) for s in (*mine, *decoded_further(grid, found))}
    assert decodings == {(*cell, window) for cell in wanted for window in n.values}


def test_another_decoding_changes_nothing_of_the_training() -> None:
    found = students(get_grid("demo"))
    for student in decoded_further(get_grid("demo"), found):
        (own,) = [s for s in found if (s.settings, s.seed) == (student.settings, student.seed)]
        assert student.recipe.evaluate == own.recipe.evaluate.model_copy(update={"block_size": student.window})
        assert (student.recipe.train, student.recipe.collect) == (own.recipe.train, own.recipe.collect)
        assert student.window != own.window == own.recipe.collect.block_size


def test_the_consistency_loss_stands_alone_in_one_level() -> None:
    """The paper's finding on quality without the AR loss needs a student that has none."""
    alone = [s for s in students(get_grid("demo")) if s.settings["ar_weight"] == 0.0]
    assert [s.recipe.train.loss.ar_weight for s in alone] == [0.0, 0.0]


@pytest.mark.parametrize("name", LARGE)
def test_no_setting_is_without_effect(name: str) -> None:
    """Windows of guesses know neither a local loss nor a noisy context."""
    for student in students(get_grid(name)):
        loss = student.recipe.train.loss
        if loss.states == "guess":
            assert (loss.target, loss.context, student.settings["states"]) == ("global", "clean", "on-policy")
        else:
            assert loss.on_policy_iterations == 0


@pytest.mark.parametrize("name", sorted(GRIDS))
def test_grids_survive_json(name: str) -> None:
    grid = get_grid(name)
    assert Grid.model_validate_json(grid.model_dump_json()) == grid


def factor(name: str, *overrides: str, crossed: bool = False) -> dict[str, object]:
    levels = [{"value": index, "overrides": [text]} for index, text in enumerate(overrides)]
    return {"name": name, "levels": levels, "crossed": crossed}


def changed(**keys: object) -> Grid:
    return Grid.from_data(get_grid("debug").model_dump() | keys, where="test")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.loss.ar_weight=-1", r"grid debug, w=1: --set: train\.loss\.ar_weight: .* greater than or equal to 0"),
        ("train.loss.weight=1", "grid debug, w=1: --set train.loss.weight: unknown key 'weight'"),
        ("task.num_train=300", "grid debug, w=1: changes task, which all students share with the base run"),
        ("finetune.optim.steps=11", "grid debug, w=1: changes finetune"),
        ("seed=1", "grid debug, w=1: changes seed"),
        ("train.loss.ar_weight=10.0", "grid debug: w=1 is the same training as centre"),
    ],
)
def test_a_level_that_cannot_be_is_named(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        students(changed(factors=[factor("w", "train.loss.ar_weight=10", override)], table=None, windows=[]))


def test_the_first_level_is_checked_too() -> None:
    levels = ["collect.max_new_tokens=300", "collect.max_new_tokens=32"]
    with pytest.raises(InputError, match=r"grid debug, room=0: .* more than teacher\.scratch\.max_positions=512"):
        students(changed(factors=[factor("room", *levels)], table=None, windows=[]))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"seeds": [3, 3]}, "seeds: one of them stands there twice"),
        ({"factors": [factor("w", "seed=0", "seed=0")] * 2}, "factors: one of them stands there twice"),
        ({"factors": [factor(name, "seed=0", "seed=1", crossed=True) for name in "abc"]}, "3 are crossed"),
        ({"factors": [factor("w", "seed=0")]}, "levels"),
        ({"table": ["data", "data"]}, "table: data × data: expected two of the factors data, n"),
        ({"table": ["data", "size"]}, "table: data × size: expected two of the factors data, n"),
        ({"table": None}, "windows: it is the students of a table that are decoded with them"),
        ({"nosuch": 1}, "nosuch"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(keys: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        changed(**keys)


def test_unknown_grids_are_named() -> None:
    with pytest.raises(InputError, match="--grid nosuch: unknown; known are demo, small, debug"):
        get_grid("nosuch")
