"""The stages of a run: what each is made from, and so when its output can be kept.

A stage's inputs are the parts of the recipe that decide its output, those of the stages before it included. Resources
are not among them: the same rows come from one machine and from many.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cllm.artifacts import is_current, read_manifest
from cllm.layout import RunLayout
from cllm.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Stage:
    """One output folder: its kind, its place, and the inputs that its manifest records."""

    kind: str
    path: Path
    inputs: dict[str, Any]

    @property
    def is_current(self) -> bool:
        return is_current(self.path, self.kind, self.inputs)

    def require(self) -> None:
        """Raise InputError unless the output is there and complete."""
        read_manifest(self.path, self.kind)


def prepare(recipe: Recipe) -> Stage:
    scratch = recipe.teacher.scratch
    tokenizer = {"path": recipe.teacher.path, "revision": recipe.teacher.revision} | (
        {"vocab_size": scratch.vocab_size} if scratch else {}
    )
    inputs = {
        "seed": recipe.seed,
        "task": _plain(recipe.task),
        "prompts": _plain(recipe.prompts),
        "tokenizer": tokenizer,
    }
    return Stage("prompts", RunLayout.of(recipe).prompts, inputs)


def finetune(recipe: Recipe) -> Stage:
    inputs = prepare(recipe).inputs | {"teacher": _plain(recipe.teacher), "finetune": _plain(recipe.finetune)}
    return Stage("teacher", RunLayout.of(recipe).finetuned, inputs)


def collect(recipe: Recipe) -> Stage:
    inputs = finetune(recipe).inputs | {"collect": _plain(recipe.collect)}
    return Stage("trajectories", RunLayout.of(recipe).trajectories, inputs)


def train(recipe: Recipe) -> Stage:
    return Stage("student", RunLayout.of(recipe).student, collect(recipe).inputs | {"train": _plain(recipe.train)})


def evaluate(recipe: Recipe) -> Stage:
    inputs = train(recipe).inputs | {"evaluate": _plain(recipe.evaluate)}
    return Stage("evaluation", RunLayout.of(recipe).evaluation, inputs)


def skip_if_current(stage: Stage, make: Callable[[], None]) -> None:
    """Make the stage's output, unless it is there and valid."""
    if stage.is_current:
        print(f"== {stage.kind}: up to date in {stage.path}", flush=True)
        return
    make()


def _plain(config: Any) -> Any:
    return None if config is None else config.model_dump(mode="json")
