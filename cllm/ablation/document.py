"""The document of an ablation, `ablation.json`: its type, and the only way to write and to read it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from cllm.ablation.effects import Effect, Effects
from cllm.ablation.grid import Setting
from cllm.artifacts import write_atomic
from cllm.bench.versioned import read_versioned
from cllm.config import Config
from cllm.errors import InputError
from cllm.evaluation.results import without_folders

SCHEMA_VERSION = 2
RESULTS_NAME = "ablation.json"
Outcome = Literal["tpf", "speedup", "accuracy", "reference_perplexity"]
_AGAIN = "run jobs/ablate.py"


class StudentRow(Config):
    """A student that was trained and measured; figures as in `cllm.ablation.cell.Figures`.

    Attributes:
        window: block size n that it was decoded with.
        source: index into the document's `sources`.
        overrides: of the base run's recipe.
    """

    settings: Mapping[str, Setting]
    seed: int
    window: int
    key: str
    source: int
    tpf: float
    speedup: float  # median over the repeats
    speedup_low: float
    speedup_high: float
    accuracy: float  # with its 95% interval
    accuracy_low: float
    accuracy_high: float
    reference_perplexity: float | None
    mean_response_tokens: float
    train_seconds: float
    train_tokens: int
    overrides: tuple[str, ...]


class Base(Config):
    """What all students share; `settings` is the centre."""

    recipe: str
    overrides: tuple[str, ...]
    centre: tuple[str, ...]
    settings: Mapping[str, Setting]
    metric: str
    num_prompts: int


class AblationDocument(Config):
    """All that is known about a grid's students.

    Attributes:
        provenance: of the job that wrote the document.
        sources: of the jobs that made the students, without their times.
        factors: every setting with its levels, the centre's first.
        rows: students, each decoded with the n of its training.
        decoded: some of them decoded with another n.
        effects: by outcome; empty while students are missing.
        missing: what could not be made, and why.
    """

    schema_version: int = SCHEMA_VERSION
    provenance: Mapping[str, Any]
    sources: tuple[Mapping[str, Any], ...]
    grid: str
    base: Base
    factors: Mapping[str, tuple[Setting, ...]]
    rows: tuple[StudentRow, ...]
    decoded: tuple[StudentRow, ...] = ()
    effects: Mapping[Outcome, Effects] = {}
    missing: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        centre = ", ".join(f"{name} {setting}" for name, setting in self.base.settings.items())
        return f"{self.grid}: {len(self.rows)} students of {self.base.recipe}; centre: {centre}"

    def at(self, **chosen: Setting) -> list[StudentRow]:
        """Students with these settings and all others at the centre."""
        wanted = {**self.base.settings, **chosen}
        return [row for row in self.rows if row.settings == wanted]

    def effect(self, outcome: Outcome, factor: str, level: Setting) -> Effect | None:
        """What a level does to an outcome; None for the centre's, or where no effects were computed."""
        effects = self.effects[outcome].effects if outcome in self.effects else ()
        return next((one for one in effects if (one.factor, one.level) == (factor, level)), None)

    def fitted(self, outcome: Outcome, **chosen: Setting) -> float | None:
        """The outcome with these settings and all others at the centre, by the sum of their main effects.

        None where no effects were computed, or they multiply.
        """
        if outcome not in self.effects or outcome == "reference_perplexity":
            return None
        found = [self.effect(outcome, name, level) for name, level in chosen.items()]
        return self.effects[outcome].centre + sum(effect.value for effect in found if effect is not None)


def write_document(folder: Path, document: AblationDocument) -> None:
    """It is published, so it names no folders. Raises InputError if the disk is full."""
    data = without_folders(document.model_dump(mode="json"))
    write_atomic(folder / RESULTS_NAME, json.dumps(data, indent=1, allow_nan=False))


def read_document(path: Path) -> AblationDocument:
    """Raises InputError if the file is missing or damaged, of another schema version, or without students."""
    data = read_versioned(path, SCHEMA_VERSION, outdated=f"{_AGAIN} again", missing=_AGAIN)
    document = AblationDocument.from_data(data, where=str(path))
    if not document.rows:
        raise InputError(f"{path}: rows: no students in it")
    return document
