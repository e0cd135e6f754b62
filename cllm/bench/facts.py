"""What belongs to a model or a method, however many requests are in flight: likelihoods, and counts of trajectories."""

from collections.abc import Sequence
from typing import Any

from cllm.bench.matrix import Cell
from cllm.bench.methods import JacobiMethod, Room, open_engine
from cllm.bench.prompts import Run
from cllm.decoding.records import DecodeRequest
from cllm.evaluation.corpora import corpus_perplexity, read_corpus
from cllm.evaluation.perplexity import reference_nll
from cllm.evaluation.subject import Subject, prompt_tokenizer
from cllm.evaluation.trajectory_counts import add_counts, count_trajectory
from cllm.tasks.prompts import Prompt

_BATCH = 32  # rows decoded together where no time is taken


def reference_perplexity(subject: Subject, prompts: Sequence[Prompt]) -> float | None:
    """On the reference answers; None where a prompt has none."""
    if not all(prompt.reference_text for prompt in prompts):
        return None
    return reference_nll(subject.model, prompts, batch_size=_BATCH, pad_id=subject.pad_id).perplexity


def corpus_perplexities(subject: Subject, cell: Cell, run: Run) -> dict[str, Any]:
    """The fields `perplexity` and `word_perplexity`. Of a broken model, corpora without a finite figure are left out.

    Raises:
        InputError: a corpus has gone.
    """
    paths = {corpus.name: corpus.path for corpus in run.corpora}
    tokenizer = prompt_tokenizer(run.recipe)
    found = {}
    for corpus in cell.corpora:
        text = read_corpus(paths[corpus.name])
        found[corpus.name] = corpus_perplexity(
            subject.model, tokenizer, text, context=corpus.context, stride=corpus.stride
        )
    return {
        "perplexity": {name: value.token for name, value in found.items() if value.token is not None},
        "word_perplexity": {name: value.word for name, value in found.items() if value.word is not None},
    }


def trajectory_counts(
    method: JacobiMethod, subject: Subject, requests: Sequence[DecodeRequest], room: Room
) -> dict[str, float]:
    """Fast-forwarded and stationary tokens (paper section 4.2), from a pass that is recorded and not timed."""
    engine = open_engine(method, subject, Room(_BATCH, room.tokens), record=True)
    counts = add_counts(count_trajectory(result) for result in engine.generate(requests))
    return {"fast_forwarded": counts.fast_forwarded, "stationary": counts.stationary_per_block}
