"""An ablation's results as its job wrote them: students, and what each setting does to them."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from cllm.ablation.effects import Effect, Effects
from cllm.ablation.grid import Setting
from cllm.ablation.results import Outcome, Row
from cllm.config import Config


class Base(Config):
    """What all students share; `settings` is the centre."""

    recipe: str
    overrides: tuple[str, ...]
    centre: tuple[str, ...]
    settings: Mapping[str, Setting]
    metric: str
    num_prompts: int


class AblationDocument(Config):
    """The document of `cllm.ablation.results`.

    Attributes:
        factors: every setting with its levels, the centre's first.
        effects: by outcome; empty while students are missing.
        missing: students that could not be made, and why.
    """

    schema_version: int
    provenance: Mapping[str, Any]
    grid: str
    base: Base
    factors: Mapping[str, tuple[Setting, ...]]
    rows: tuple[Row, ...]
    effects: Mapping[Outcome, Effects] = {}
    missing: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        centre = ", ".join(f"{name} {setting}" for name, setting in self.base.settings.items())
        return f"{self.grid}: {len(self.rows)} students of {self.base.recipe}; centre: {centre}"

    def at(self, **chosen: Setting) -> list[Row]:
        """Students with these settings and all others at the centre."""
        wanted = {**self.base.settings, **chosen}
        return [row for row in self.rows if row.settings == wanted]

    def effect(self, outcome: Outcome, factor: str, level: Setting) -> Effect | None:
        """What a level does to an outcome; None for the centre's, or where no effects were computed."""
        effects = self.effects[outcome].effects if outcome in self.effects else ()
        return next((one for one in effects if (one.factor, one.level) == (factor, level)), None)

    def measured(self, outcome: Outcome, **chosen: Setting) -> float | None:
        """Mean over the students with these settings and all others at the centre; None if there is none."""
        values = [getattr(row, outcome) for row in self.at(**chosen)]
        return fmean(values) if values and None not in values else None

    def fitted(self, outcome: Outcome, **chosen: Setting) -> float | None:
        """The outcome with these settings and all others at the centre, by the sum of their main effects.

        None where no effects were computed, or they multiply.
        """
        if outcome not in self.effects or outcome == "reference_perplexity":
            return None
        found = [self.effect(outcome, name, level) for name, level in chosen.items()]
        return self.effects[outcome].centre + sum(effect.value for effect in found if effect is not None)
