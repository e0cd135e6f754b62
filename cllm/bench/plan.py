"""From a matrix recipe to its cells: looks at everything that they need, before any of them starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from cllm.bench.drafts import Placed, draft_weights, placed
from cllm.bench.loads import load_of
from cllm.bench.matrix import Cell, Corpus, LoadConfig, MatrixRecipe, Obstacle, Platform, RunConfig, RunKey
from cllm.bench.methods import MethodConfig, engine_of, gpus_of, missing_part, obstacle
from cllm.bench.prompts import Questions, Run, draw_questions, longest_request
from cllm.bench.scorers import scorer_hash, token_hash
from cllm.config import digest
from cllm.errors import InputError
from cllm.evaluation.corpora import CorpusConfig, read_corpus
from cllm.evaluation.subject import SubjectName, checkpoint
from cllm.layout import RunLayout
from cllm.models import check_context_fits, context_length, load_tokenizer, weights_revision
from cllm.tasks.base import FOLLOW_UP
from cllm.tasks.prompts import Prompt, read_metadata, tokenizer_hash


@dataclass(frozen=True, slots=True)
class Plan:
    """What a matrix comes to on a platform.

    Attributes:
        cells: in the order of measurement.
        cannot_run: what the matrix asks for and is no cell.
        left_out: what cells are not asked, though they run: prompts that are too long, corpora that are not there.
    """

    cells: tuple[Cell, ...]
    cannot_run: tuple[Obstacle, ...]
    left_out: tuple[Obstacle, ...]
    runs: Mapping[RunKey, Run]


def plan(matrix: MatrixRecipe, platform: Platform) -> Plan:
    """The cells of a matrix, those that share a model one after the other.

    Raises:
        InputError: a run whose recipe or override is unknown.
    """
    texts, missing = _read_corpora(matrix.corpora)
    known = tuple(corpus for corpus in matrix.corpora if corpus.name in texts)
    runs = {run.key: Run(run.resolve(), run.test, run.max_prompt_tokens, known) for run in matrix.runs}
    found = _Found()
    for config in matrix.runs:
        _RunPlan(matrix, config, runs[config.key], platform, texts, found).find()
    names = dict.fromkeys(run.title for run in matrix.runs)
    found.left_out += [Obstacle(run=run, why=why) for run in names for why in missing]
    groups = list(dict.fromkeys(cell.group for cell in found.cells))
    cells = sorted(found.cells, key=lambda cell: groups.index(cell.group))
    return Plan(tuple(cells), tuple(found.cannot_run), tuple(found.left_out), runs)


def _read_corpora(corpora: Sequence[CorpusConfig]) -> tuple[dict[str, str], list[str]]:
    """Hashes of the texts by name, and why the others cannot be read."""
    hashes, missing = {}, []
    for corpus in corpora:
        try:
            hashes[corpus.name] = digest(read_corpus(corpus.path))
        except InputError as error:
            missing.append(f"perplexity on {corpus.name}: {error}")
    return hashes, missing


@dataclass(slots=True)
class _Found:
    """What the runs come to so far."""

    cells: list[Cell] = field(default_factory=list)
    cannot_run: list[Obstacle] = field(default_factory=list)
    left_out: list[Obstacle] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _RunPlan:
    """One run with one test set; what it comes to is added to `found`."""

    matrix: MatrixRecipe
    config: RunConfig
    run: Run
    platform: Platform
    texts: Mapping[str, str]  # hashes of the corpora by name
    found: _Found

    def find(self) -> None:
        load = load_of(self.matrix.load, self.config, self.run.recipe)
        assert load.max_new_tokens is not None
        try:
            questions = draw_questions(self.run, load.num_prompts)
            longest = longest_request(self.run, questions.prompts, load.max_new_tokens)
            shared = self._shared(questions, load)
        except InputError as error:
            self._refuse(why=_with_the_way(error, self.run))
            return
        if questions.too_long:
            limit = self.run.prompt_config.max_prompt_tokens
            why = f"{questions.too_long} prompts left out: longer than max_prompt_tokens={limit}"
            self.found.left_out.append(self._obstacle(why=why))
        for model in self.matrix.models:
            try:
                weights = self._checked_weights(model, longest, load.max_new_tokens)
            except InputError as error:
                self._refuse(model=model, why=str(error))
                continue
            known = {"model": model, "weights": weights, "tokenizer": token_hash(self.run, model)}
            for method in self.matrix.methods:
                self._find_cells(shared | known, model, method, load)

    def _shared(self, questions: Questions, load: LoadConfig) -> dict[str, Any]:
        """What all cells have in common."""
        return {
            "run": self.config.title,
            "test": self.config.test.name if self.config.test else "",
            "task": self.run.task.name,
            "data": _data_hash(questions.prompts),
            "scorer": scorer_hash(self.run, questions.prompts),
            "load": load,
            "precision": self.run.recipe.evaluate.precision,
        }

    def _find_cells(
        self, shared: Mapping[str, Any], model: SubjectName, method: MethodConfig, load: LoadConfig
    ) -> None:
        """The cells of one method."""
        try:
            ready = self._ready(method, model)
        except InputError as error:
            self._refuse(model=model, method=method.label, why=str(error))
            return
        own = {"method": method, "draft": draft_weights(ready), "own_model": ready.own_model}
        here = self.platform.for_engine(engine_of(method))
        for concurrency, seed in product(self.matrix.concurrencies_of(method), self.matrix.seeds):
            why = obstacle(method, concurrency=concurrency, temperature=load.temperature)
            corpora = self._corpora(model) if method.kind == "ar" and concurrency == 1 else ()
            cell = own | {"concurrency": concurrency, "seed": seed, "corpora": corpora}
            if why is None:
                self.found.cells.append(Cell(**shared, **cell, platform=here))
            elif seed == self.matrix.seeds[0]:
                self._refuse(model=model, method=method.label, concurrency=concurrency, why=why)

    def _ready(self, method: MethodConfig, model: SubjectName) -> Placed:
        """Raises InputError: the method cannot run here, whatever the load."""
        if gpus_of(method) > max(1, self.matrix.gpus):
            raise InputError(f"its model is spread over {gpus_of(method)} GPUs, the matrix has gpus={self.matrix.gpus}")
        ready = placed(method, self.run.recipe, model)
        missing = missing_part(ready.method, ready.path)
        if missing is not None:
            raise InputError(missing)
        return ready

    def _checked_weights(self, model: SubjectName, longest: int, new_tokens: int) -> str:
        """The checkpoint's hash, after checking that it reads the prompts: another tokenizer's ids are other words."""
        path, revision = checkpoint(model, self.run.recipe)
        if Path(path).is_absolute() and not any(Path(path).glob("*.safetensors")):
            raise InputError(f"{path}: no weights (*.safetensors); run jobs/pipeline.py")
        check_context_fits(path, revision, prompt_tokens=longest - new_tokens, new_tokens=new_tokens)
        tokenizer, prompts_file = load_tokenizer(path, revision), RunLayout.of(self.run.recipe).prompts_file
        if tokenizer_hash(tokenizer) != read_metadata(prompts_file).get("tokenizer_hash"):
            raise InputError(f"{path}: its tokenizer is not the one that made {prompts_file}; run jobs/pipeline.py")
        return weights_revision(path, revision)

    def _corpora(self, model: SubjectName) -> tuple[Corpus, ...]:
        """With the window that this model can read."""
        limit = context_length(*checkpoint(model, self.run.recipe))
        found = []
        for corpus in self.run.corpora:
            context = min(corpus.context, limit)
            stride = min(corpus.stride, context // 2) if context < corpus.context else corpus.stride
            found.append(Corpus(name=corpus.name, data=self.texts[corpus.name], context=context, stride=stride))
        return tuple(found)

    def _refuse(self, **fields: Any) -> None:
        self.found.cannot_run.append(self._obstacle(**fields))

    def _obstacle(self, **fields: Any) -> Obstacle:
        return Obstacle(run=self.config.title, test=self.config.test.name if self.config.test else "", **fields)


def _with_the_way(error: InputError, run: Run) -> str:
    return str(error) if run.test is not None else f"{error}; run jobs/pipeline.py"


def _data_hash(prompts: Sequence[Prompt]) -> str:
    """Of all that is asked; second questions are part of it, though their prompts are made later."""
    rows = []
    for prompt in prompts:
        row = [prompt.prompt_id, prompt.prompt_ids, prompt.reference_text]
        rows.append([*row, prompt.context[FOLLOW_UP]] if FOLLOW_UP in prompt.context else row)
    return digest(rows)
