"""Main effects are those that were put in; their intervals are the textbook's, and wide where settings interact."""

import math
import random

import pytest
from scipy import stats

from cllm.ablation.effects import main_effects
from cllm.ablation.grid import Setting, students
from cllm.ablation.grids import get_grid

GRID = get_grid("demo")
LEVELS = {factor.name: factor.values for factor in GRID.factors}
SETTINGS = [student.settings for student in students(GRID)]


def effect_of(settings: dict[str, Setting]) -> float:
    """An additive outcome: 3 at the centre."""
    changes = {("data", 0.25): -0.5, ("n", 32): 1.0, ("loss", "local"): -0.25, ("divergence", "jsd"): -2.0}
    return 3.0 + sum(changes.get(item, 0.0) for item in settings.items())


def test_what_was_put_in_comes_out() -> None:
    fitted = main_effects(SETTINGS, [effect_of(dict(settings)) for settings in SETTINGS], LEVELS)
    found = {(effect.factor, effect.level): effect for effect in fitted.effects}
    assert len(found) == sum(len(values) - 1 for values in LEVELS.values())
    assert fitted.centre == pytest.approx(3)
    for (factor, level), effect in found.items():
        wanted = effect_of({factor: level}) - 3
        assert effect.value == pytest.approx(wanted, abs=1e-9)
        assert effect.fitted == pytest.approx(3 + wanted)


def test_ratios_multiply() -> None:
    outcomes = [7.0 * (3 if s["n"] == 8 else 1) * (0.5 if s["loss"] == "local" else 1) for s in SETTINGS]
    fitted = main_effects(SETTINGS, outcomes, LEVELS, ratio=True)
    found = {(effect.factor, effect.level): effect for effect in fitted.effects}
    assert found["n", 8].value == pytest.approx(3)
    assert found["n", 8].fitted == pytest.approx(21)
    assert found["loss", "local"].value == pytest.approx(0.5)
    assert (found["ar_weight", 10.0].value, found["ar_weight", 10.0].neutral) == (pytest.approx(1), 1)


def test_the_interval_of_one_factor_is_that_of_the_t_test() -> None:
    low, high = [1.0, 1.2, 0.9, 1.4], [2.0, 1.1, 1.7]
    settings = [{"n": 8}] * len(low) + [{"n": 16}] * len(high)
    (effect,) = main_effects(settings, low + high, {"n": (8, 16)}).effects
    expected = stats.ttest_ind(high, low).confidence_interval(0.95)
    assert (effect.low, effect.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert effect.matters == (stats.ttest_ind(high, low).pvalue < 0.05)


def test_one_in_twenty_effects_of_noise_matters() -> None:
    noise = random.Random(0)
    found = [
        effect.matters
        for _ in range(200)
        for effect in main_effects(SETTINGS, [noise.gauss(0, 1) for _ in SETTINGS], LEVELS).effects
    ]
    assert 0.035 < sum(found) / len(found) < 0.065


def test_an_interaction_widens_intervals_and_is_no_effect_of_the_crossing() -> None:
    crossed = [factor for factor in GRID.factors if factor.crossed]
    rows = [
        student.settings
        for student in students(GRID)
        if sum(student.settings[f.name] == f.values[1] for f in crossed) % 2 == 0
        and all(student.settings[f.name] in f.values[: 2 if f.crossed else 1] for f in GRID.factors)
        and student.seed == 0
    ]
    levels = {factor.name: factor.values[:2] for factor in crossed}
    outcomes = [(-1.0) ** ((s["n"] == 8) + (s["loss"] == "local")) + 2.0 * (s["context"] == "noisy") for s in rows]
    fitted = main_effects(rows, outcomes, levels)
    assert len(rows) == 16
    for effect in fitted.effects:
        assert effect.value == pytest.approx(2.0 if effect.factor == "context" else 0.0, abs=1e-9)
        assert effect.high is not None
        assert effect.high - effect.value > 0.5
        assert effect.matters == (effect.factor == "context")


def test_without_noise_to_measure_there_is_no_interval() -> None:
    (effect,) = main_effects([{"n": 8}, {"n": 16}], [1.0, 5.0], {"n": (8, 16)}).effects
    assert (effect.value, effect.low, effect.high, effect.matters) == (pytest.approx(4), None, None, False)


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, math.pi])
def test_nothing_matters_where_all_outcomes_are_the_same(value: float) -> None:
    assert not any(effect.matters for effect in main_effects(SETTINGS, [value] * len(SETTINGS), LEVELS).effects)


def test_levels_that_only_occur_together_are_refused() -> None:
    settings = [{"n": 8, "loss": "global"}, {"n": 16, "loss": "local"}] * 3
    with pytest.raises(ValueError, match="tell all levels apart"):
        main_effects(settings, [1.0, 2.0] * 3, {"n": (8, 16), "loss": ("global", "local")})
