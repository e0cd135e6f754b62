"""The grid of an ablation: factors with levels around a centre, and the students that it stands for.

The first level of every factor is the centre. The students are

- the centre, once a seed;
- the crossing: of the first two levels of the crossed factors, the half of all combinations in which an even number of
  factors is changed, with the first seed. This is the fraction I = AB...K of a two-level design: with five factors it
  has 16 runs, and neither a main effect nor an interaction of two factors is confused with another one of these;
- one at a time: the centre with one factor at another level, once a seed; with the first seed only where the crossing
  has the level too;
- the table: of two factors all combinations of levels that are not among these, with the first seed.

All of them start at the base run's teacher and share its prompts. Each is decoded with the n of its training; the
students of the table with other n as well, as the paper does.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product

from pydantic import Field, model_validator

from cllm.bench.matrix import RunConfig
from cllm.config import Config
from cllm.errors import InputError
from cllm.recipe import Recipe

Setting = str | int | float
MIN_CROSSED = 4  # with three factors each main effect is one with the interaction of the other two
_SHARED = ("seed", "task", "prompts", "teacher", "finetune")  # what all students have of the base run
_WHOLE_BUDGET = ("train.validate_every=null", "train.patience=null")  # no student stops before the others


class Level(Config):
    """A value as it stands in tables, and what it means in a recipe."""

    value: Setting
    overrides: tuple[str, ...]


class Factor(Config):
    """A setting that is varied; the first level is the centre's."""

    name: str
    levels: tuple[Level, ...] = Field(min_length=2)
    crossed: bool = False

    @model_validator(mode="after")
    def _levels_are_distinct(self) -> "Factor":
        if len(set(self.values)) < len(self.levels):
            raise ValueError(f"factor {self.name}: one of its levels stands there twice ({self.values})")
        return self

    @property
    def values(self) -> tuple[Setting, ...]:
        return tuple(level.value for level in self.levels)


class Grid(Config):
    """Which students to train and measure. What they are measured on is their recipe's evaluate section."""

    name: str
    output: str  # folder of the results
    base: RunConfig  # a finished run: its prompts and its teacher, and its trajectories where they fit
    centre: tuple[str, ...] = ()  # overrides of the base's recipe that all students have
    factors: tuple[Factor, ...] = Field(min_length=1)
    table: tuple[str, str] | None = None  # two factors of which every combination has a student
    windows: tuple[int, ...] = ()  # block sizes n that the students of the table are decoded with, beside their own
    seeds: tuple[int, ...] = Field((0, 1), min_length=1)  # of training: order of the data, draws of states
    gpus: int = Field(0, ge=0)  # students trained at a time, each on a GPU of its own; 0: on the CPUs of whole machines

    @model_validator(mode="after")
    def _design_is_sound(self) -> "Grid":
        names = [factor.name for factor in self.factors]
        crossed = sum(factor.crossed for factor in self.factors)
        if len(set(names)) < len(names):
            raise ValueError(f"factors: one of them stands there twice ({', '.join(names)})")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: one of them stands there twice ({', '.join(map(str, self.seeds))})")
        if 0 < crossed < MIN_CROSSED:
            raise ValueError(f"factors: {crossed} are crossed; cross none or at least {MIN_CROSSED}")
        if self.table is not None and not (set(self.table) <= set(names) and len(set(self.table)) == 2):
            raise ValueError(f"table: {' × '.join(self.table)}: expected two of the factors {', '.join(names)}")
        if self.windows and self.table is None:
            raise ValueError("windows: it is the students of a table that are decoded with them; set table")
        return self


@dataclass(frozen=True, slots=True)
class Student:
    """One training to do, and how to decode what comes of it.

    Attributes:
        settings: the level's value of every factor.
        recipe: of the base run with the student's overrides.
        overrides: of the base run's recipe.
        further: whether it is a student once more, decoded with another n than that of its training.
    """

    settings: Mapping[str, Setting]
    seed: int
    recipe: Recipe
    overrides: tuple[str, ...]
    further: bool = False

    @property
    def window(self) -> int:
        """The block size n of its decoding."""
        return self.recipe.evaluate.block_size


def students(grid: Grid) -> list[Student]:
    """All students of a grid, after resolving every level by itself and in its combinations.

    Raises:
        InputError: an unknown run; a level that the recipe refuses, that changes the prompts or the teacher, or that
            changes nothing. The level is named.
    """
    base = grid.base.resolve()
    for factor in grid.factors:
        for index in range(len(factor.levels)):
            _resolve(grid, base, {factor.name: index})
    found = [_student(grid, base, changed, seed) for changed, seed in _design(grid)]
    titles: dict[str, str] = {}
    for student in found:
        key = f"{student.seed}/{student.recipe.fingerprint()}"
        title = title_of(grid, student.settings)
        if key in titles:
            raise InputError(f"grid {grid.name}: {title} is the same training as {titles[key]}")
        titles[key] = title
    return found


def decoded_further(grid: Grid, found: Sequence[Student]) -> list[Student]:
    """The students of the table, of the first seed, with those windows that are not their own."""
    if grid.table is None:
        return []
    centre, free = centre_settings(grid), set(grid.table)
    mine = [
        student
        for student in found
        if student.seed == grid.seeds[0]
        and all(value == centre[name] for name, value in student.settings.items() if name not in free)
    ]
    return [_with_window(student, window) for student in mine for window in grid.windows if window != student.window]


def centre_settings(grid: Grid) -> dict[str, Setting]:
    """The first level of every factor."""
    return {factor.name: factor.values[0] for factor in grid.factors}


def title_of(grid: Grid, settings: Mapping[str, Setting]) -> str:
    """In what a student differs from the centre."""
    centre = centre_settings(grid)
    changed = [f"{name}={value}" for name, value in settings.items() if value != centre[name]]
    return ", ".join(changed) or "centre"


def _design(grid: Grid) -> Iterator[tuple[dict[str, int], int]]:
    """Changed factors with the index of their level, and the seed."""
    yield from (({}, seed) for seed in grid.seeds)
    crossed = [factor.name for factor in grid.factors if factor.crossed]
    for size in range(2, len(crossed) + 1, 2):
        yield from ((dict.fromkeys(names, 1), grid.seeds[0]) for names in combinations(crossed, size))
    for factor in grid.factors:
        for index in range(1, len(factor.levels)):
            seeds = grid.seeds[:1] if factor.crossed and index == 1 else grid.seeds
            yield from (({factor.name: index}, seed) for seed in seeds)
    yield from ((changed, grid.seeds[0]) for changed in _combinations(grid))


def _combinations(grid: Grid) -> Iterator[dict[str, int]]:
    """Those of the table that have no student yet."""
    if grid.table is None:
        return
    one, other = (next(factor for factor in grid.factors if factor.name == name) for name in grid.table)
    for i, j in product(range(1, len(one.levels)), range(1, len(other.levels))):
        if not (one.crossed and other.crossed and i == j == 1):
            yield {one.name: i, other.name: j}


def _with_window(student: Student, window: int) -> Student:
    override = f"evaluate.block_size={window}"
    recipe = student.recipe.with_overrides([override])
    return replace(student, recipe=recipe, overrides=(*student.overrides, override), further=True)


def _student(grid: Grid, base: Recipe, changed: Mapping[str, int], seed: int) -> Student:
    levels = {factor.name: factor.levels[changed.get(factor.name, 0)] for factor in grid.factors}
    recipe, overrides = _resolve(grid, base, changed)
    return Student({name: level.value for name, level in levels.items()}, seed, recipe, overrides)


def _resolve(grid: Grid, base: Recipe, changed: Mapping[str, int]) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe of a student, and its overrides."""
    levels = {factor.name: factor.levels[changed.get(factor.name, 0)] for factor in grid.factors}
    overrides = (*grid.centre, *_WHOLE_BUDGET, *(text for level in levels.values() for text in level.overrides))
    where = f"grid {grid.name}, " + (", ".join(f"{name}={levels[name].value}" for name in changed) or "centre")
    try:
        recipe = base.with_overrides(overrides)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    for section in _SHARED:
        if getattr(recipe, section) != getattr(base, section):
            raise InputError(f"{where}: changes {section}, which all students share with the base run")
    # Training and collection ask for GPUs as the grid says; a student has one whatever their number.
    resources = recipe.resources.model_copy(update={"gpus": grid.gpus})
    return recipe.model_copy(update={"resources": resources}), overrides
