"""The stages of a run: what each is made from, and so when its output can be kept.

A stage's inputs are the parts of the recipe that decide its output, those of the stages before it included. Resources
are not among them: the same rows come from one machine and from many. Nor is the storage, where finished outputs are
copied to and, where they are missing here, taken from.

A stage also says whose outputs it reads, all of them and not only the last: a stage made anew by itself leaves the ones
behind it as they were, made from something else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cllm.artifacts import input_difference, is_current, read_manifest
from cllm.config import Config
from cllm.errors import InputError
from cllm.layout import RunLayout
from cllm.recipe import Recipe
from cllm.storage import Storage


@dataclass(frozen=True, slots=True)
class Stage:
    """One output folder: its kind, the job that makes it, its place, and the inputs that its manifest records.

    `storage` is the URI of the run's copies; None: it has none. `sources` are the stages whose outputs this one reads.
    """

    kind: str
    job: str
    path: Path
    inputs: dict[str, Any]
    storage: str | None = None
    sources: tuple["Stage", ...] = ()

    @property
    def is_current(self) -> bool:
        return is_current(self.path, self.kind, self.inputs)

    def fetch(self) -> None:
        """Take the output from the storage, if it is not valid here and finished there.

        Raises:
            InputError: the storage cannot be read, or its copy is damaged.
        """
        if self.storage is None or self.is_current:
            return
        storage = Storage.open(self.storage)
        manifest = storage.manifest(self.path.name, self.kind)
        if manifest is not None and input_difference(manifest, self.inputs) is None:
            print(f"== {self.kind}: fetching {self.path.name} from {self.storage}", flush=True)
            storage.get(self.path, manifest)

    def publish(self) -> None:
        """Copy the finished output to the storage, unless it is there.

        Raises:
            InputError: the output is not finished, or the storage cannot be written.
        """
        if self.storage is not None and Storage.open(self.storage).put(self.path, self.kind):
            print(f"== {self.kind}: copied to {self.storage}", flush=True)

    def require(self) -> None:
        """Check that a stage may build on this output, after fetching it where it is only in the storage.

        Raises:
            InputError: it is missing, damaged, or left over from another recipe (the first key that differs is named);
                with the job to run. Or as `fetch`.
        """
        self.fetch()
        try:
            manifest = read_manifest(self.path, self.kind)
        except InputError as error:
            raise InputError(f"{error}; run jobs/{self.job}.py") from error
        difference = input_difference(manifest, self.inputs)
        if difference is not None:
            raise InputError(
                f"{self.path}: made with {difference.key}={difference.found!s:.80}, the recipe says "
                f"{difference.wanted!s:.80}; run jobs/{self.job}.py"
            )

    def require_sources(self) -> None:
        """`require` every output that this stage reads. Each job does so before it starts anything.

        Raises:
            InputError: as `require`, of the earliest stage that is at fault.
        """
        for source in self.sources:
            source.require()


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
    return Stage("prompts", "prepare", RunLayout.of(recipe).prompts, inputs, recipe.storage)


def finetune(recipe: Recipe) -> Stage:
    inputs = prepare(recipe).inputs | {"teacher": _plain(recipe.teacher), "finetune": _plain(recipe.finetune)}
    return Stage("teacher", "finetune", RunLayout.of(recipe).finetuned, inputs, recipe.storage, (prepare(recipe),))


def collect(recipe: Recipe) -> Stage:
    inputs = finetune(recipe).inputs | {"collect": _plain(recipe.collect)}
    return Stage("trajectories", "collect", RunLayout.of(recipe).trajectories, inputs, recipe.storage, _models(recipe))


def train(recipe: Recipe) -> Stage:
    inputs = collect(recipe).inputs | {"train": _plain(recipe.train)}
    return Stage("student", "train", RunLayout.of(recipe).student, inputs, recipe.storage, _data(recipe))


def draft(recipe: Recipe) -> Stage:
    """The distilled draft model; no stage of the pipeline."""
    return _baseline("draft", recipe, RunLayout.of(recipe).draft, recipe.baselines and recipe.baselines.draft)


def medusa(recipe: Recipe) -> Stage:
    """The Medusa heads; no stage of the pipeline."""
    return _baseline("medusa", recipe, RunLayout.of(recipe).medusa, recipe.baselines and recipe.baselines.medusa)


def evaluate(recipe: Recipe) -> Stage:
    inputs = train(recipe).inputs | {"evaluate": _plain(recipe.evaluate)}
    sources = (*_models(recipe), train(recipe))
    return Stage("evaluation", "evaluate", RunLayout.of(recipe).evaluation, inputs, recipe.storage, sources)


def bench(recipe: Recipe) -> Stage:
    """Measurements of distillation itself; no other stage reads them."""
    inputs = train(recipe).inputs
    return Stage("bench", "bench_distill", RunLayout.of(recipe).bench, inputs, recipe.storage, _data(recipe))


def skip_if_current(stage: Stage, make: Callable[[], None]) -> bool:
    """Make the stage's output, unless it is valid here or in the run's storage, and keep a copy in the storage.

    Returns:
        Whether it was made.
    """
    stage.fetch()
    missing = not stage.is_current
    if missing:
        make()
    else:
        print(f"== {stage.kind}: up to date in {stage.path}", flush=True)
    stage.publish()
    return missing


def _baseline(kind: str, recipe: Recipe, path: Path, section: Config | None) -> Stage:
    inputs = collect(recipe).inputs | {kind: _plain(section)}
    return Stage(kind, "baselines", path, inputs, recipe.storage, _data(recipe))


def _models(recipe: Recipe) -> tuple[Stage, ...]:
    """What decoding by the teacher reads: prompts, and the teacher where a stage makes it."""
    return (prepare(recipe), finetune(recipe)) if recipe.finetune is not None else (prepare(recipe),)


def _data(recipe: Recipe) -> tuple[Stage, ...]:
    """What training on the teacher's responses reads."""
    return (*_models(recipe), collect(recipe))


def _plain(config: Any) -> Any:
    return None if config is None else config.model_dump(mode="json")
