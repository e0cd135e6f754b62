"""From a matrix recipe to its cells: looks at everything that they need, before any of them starts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from cllm.bench.drafts import draft_weights, placed
from cllm.bench.matrix import Cell, Corpus, LoadConfig, MatrixRecipe, Obstacle, Platform, RunConfig, RunKey
from cllm.bench.methods import engine_of, missing_part, obstacle
from cllm.bench.prompts import Run, draw_questions, longest_request
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
    """What a matrix comes to on a platform: the cells in the order of measurement, and those that cannot run."""

    cells: tuple[Cell, ...]
    cannot_run: tuple[Obstacle, ...]
    runs: Mapping[RunKey, Run]


def plan(matrix: MatrixRecipe, platform: Platform) -> Plan:
    """The cells of a matrix, those that share a model one after the other.

    Raises:
        InputError: a run whose recipe or override is unknown.
    """
    cells: list[Cell] = []
    obstacles: list[Obstacle] = []
    texts, missing = _read_corpora(matrix.corpora)
    known = tuple(corpus for corpus in matrix.corpora if corpus.name in texts)
    runs = {run.key: Run(run.resolve(), run.test, run.max_prompt_tokens, known) for run in matrix.runs}
    for config in matrix.runs:
        for found in _RunPlan(matrix, config, runs[config.key], platform, texts).find():
            (obstacles if isinstance(found, Obstacle) else cells).append(found)  # type: ignore[arg-type]
    for run in dict.fromkeys(run.title for run in matrix.runs):
        obstacles += [Obstacle(run=run, why=why) for why in missing]
    groups = list(dict.fromkeys(cell.group for cell in cells))
    return Plan(tuple(sorted(cells, key=lambda cell: groups.index(cell.group))), tuple(obstacles), runs)


def _read_corpora(corpora: Sequence[CorpusConfig]) -> tuple[dict[str, str], list[str]]:
    """Hashes of the texts by name, and why the others cannot be read."""
    hashes, missing = {}, []
    for corpus in corpora:
        try:
            hashes[corpus.name] = digest(read_corpus(corpus.path))
        except InputError as error:
            missing.append(f"perplexity on {corpus.name}: {error}")
    return hashes, missing


@dataclass(frozen=True, slots=True)
class _RunPlan:
    """One run with one test set."""

    matrix: MatrixRecipe
    config: RunConfig
    run: Run
    platform: Platform
    texts: Mapping[str, str]  # hashes of the corpora by name

    def find(self) -> Iterator[Cell | Obstacle]:
        recipe = self.run.recipe
        new_tokens = self.matrix.load.max_new_tokens or recipe.evaluate.max_new_tokens
        load = self.matrix.load.model_copy(update={"max_new_tokens": new_tokens})
        try:
            questions = draw_questions(self.run, load.num_prompts)
            longest = longest_request(self.run, questions.prompts, new_tokens)
        except InputError as error:
            yield self._obstacle(why=_with_the_way(error, self.run))
            return
        if questions.too_long:
            limit = self.run.prompt_config.max_prompt_tokens
            why = f"{questions.too_long} prompts left out: longer than max_prompt_tokens={limit}"
            yield self._obstacle(why=why)
        for model in self.matrix.models:
            try:
                weights = self._checked_weights(model, longest, new_tokens)
            except InputError as error:
                yield self._obstacle(model=model, why=f"{error}; run jobs/pipeline.py")
                continue
            shared = {
                "run": self.config.title,
                "test": self.config.test.name if self.config.test else "",
                "task": self.run.task.name,
                "data": _data_hash(questions.prompts),
                "model": model,
                "weights": weights,
                "load": load,
                "precision": recipe.evaluate.precision,
            }
            yield from self._find_cells(shared, model, load)

    def _find_cells(self, shared: Mapping[str, Any], model: SubjectName, load: LoadConfig) -> Iterator[Cell | Obstacle]:
        for method in self.matrix.methods:
            try:
                ready = placed(method, self.run.recipe, model)
                missing = missing_part(ready, checkpoint(model, self.run.recipe)[0])
            except InputError as error:
                missing = str(error)
            if missing is not None:
                yield self._obstacle(model=model, method=method.label, why=missing)
                continue
            draft, here = draft_weights(ready), self.platform.for_engine(engine_of(method))
            for concurrency, seed in product(self.matrix.concurrencies_of(method), self.matrix.seeds):
                why = obstacle(method, concurrency=concurrency, temperature=load.temperature)
                corpora = self._corpora(model) if method.kind == "ar" and concurrency == 1 else ()
                cell = {"method": method, "draft": draft, "concurrency": concurrency, "seed": seed, "corpora": corpora}
                if why is None:
                    yield Cell(**shared, **cell, platform=here)
                elif seed == self.matrix.seeds[0]:
                    yield self._obstacle(model=model, method=method.label, concurrency=concurrency, why=why)

    def _checked_weights(self, model: SubjectName, longest: int, new_tokens: int) -> str:
        """The checkpoint's hash, after checking that it reads the prompts: another tokenizer's ids are other words."""
        path, revision = checkpoint(model, self.run.recipe)
        check_context_fits(path, revision, prompt_tokens=longest - new_tokens, new_tokens=new_tokens)
        if Path(path).is_dir() and not any(Path(path).glob("*.safetensors")):
            raise InputError(f"{path}: no weights (*.safetensors)")
        tokenizer, prompts_file = load_tokenizer(path, revision), RunLayout.of(self.run.recipe).prompts_file
        if tokenizer_hash(tokenizer) != read_metadata(prompts_file).get("tokenizer_hash"):
            raise InputError(f"{path}: its tokenizer is not the one that made {prompts_file}")
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
