"""What belongs to a model or a method, however many requests are in flight: likelihoods, and counts of trajectories."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from cllm.bench.matrix import Cell
from cllm.bench.methods import JacobiMethod, Room, open_engine
from cllm.bench.prompts import Run
from cllm.bench.requests import requests_of
from cllm.bench.shelf import Shelf
from cllm.evaluation.corpora import CorpusPerplexity, corpus_perplexity, read_corpus
from cllm.evaluation.perplexity import reference_nll
from cllm.evaluation.subject import prompt_tokenizer
from cllm.evaluation.trajectory_counts import TrajectoryCounts, add_counts, count_trajectory
from cllm.tasks.prompts import Prompt

_BATCH = 32  # rows decoded together where no time is taken
_Fact = TypeVar("_Fact")


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a cell's model and method; None or nothing where it does not apply.

    Attributes:
        trajectories: fast-forwarded and stationary tokens (paper section 4.2), for the paper's own decoding.
        reference_perplexity: on the reference answers; for AR, and where every prompt has one.
        corpora: perplexities by corpus.
    """

    trajectories: TrajectoryCounts | None = None
    reference_perplexity: float | None = None
    corpora: Mapping[str, CorpusPerplexity] = field(default_factory=dict)


class FactFinder:
    """Finds each fact once, with no decoder open: that would leave too little memory.

    Args:
        shelf: where the models are.
    """

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._known: dict[tuple[object, ...], object] = {}

    def find(self, cell: Cell, run: Run, prompts: Sequence[Prompt], room: Room) -> Facts:
        """Raises InputError: the model cannot be loaded, or a corpus has gone."""
        method, model = cell.method, (cell.group[:2], cell.weights)
        counts, perplexity, corpora = None, None, {}
        if isinstance(method, JacobiMethod) and method.is_paper:
            decoded = "trajectories", model, cell.data, cell.load, cell.seed, method
            counts = self._once(decoded, lambda: self._count(method, cell, run, prompts, room))
        if method.kind == "ar":
            read = "references", model, cell.data
            perplexity = self._once(read, lambda: self._reference_perplexity(cell, run, prompts))
        if cell.corpora:
            corpora = self._once(("corpora", model, cell.corpora), lambda: self._corpus_perplexities(cell, run))
        return Facts(counts, perplexity, corpora)

    def _once(self, key: tuple[object, ...], find: Callable[[], _Fact]) -> _Fact:
        if key not in self._known:
            self._shelf.close_decoder()
            self._known[key] = find()
        return self._known[key]  # type: ignore[return-value]  # a key's first word decides the type

    def _count(
        self, method: JacobiMethod, cell: Cell, run: Run, prompts: Sequence[Prompt], room: Room
    ) -> TrajectoryCounts:
        """From a pass that is recorded and not timed."""
        engine = open_engine(method, self._shelf.subject(cell, run), Room(_BATCH, room.tokens), record=True)
        return add_counts(count_trajectory(result) for result in engine.generate(requests_of(cell, prompts)))

    def _reference_perplexity(self, cell: Cell, run: Run, prompts: Sequence[Prompt]) -> float | None:
        if not all(prompt.reference_text for prompt in prompts):
            return None
        subject = self._shelf.subject(cell, run)
        return reference_nll(subject.model, prompts, batch_size=_BATCH, pad_id=subject.pad_id).perplexity

    def _corpus_perplexities(self, cell: Cell, run: Run) -> dict[str, CorpusPerplexity]:
        paths = {corpus.name: corpus.path for corpus in run.corpora}
        model, tokenizer = self._shelf.subject(cell, run).model, prompt_tokenizer(run.recipe)
        return {
            corpus.name: corpus_perplexity(
                model, tokenizer, read_corpus(paths[corpus.name]), context=corpus.context, stride=corpus.stride
            )
            for corpus in cell.corpora
        }
