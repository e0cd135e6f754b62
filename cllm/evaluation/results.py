"""Outputs, scores and timings of an evaluation -> one document of plain data, which tables and plots are made of."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from cllm.evaluation.decode import Method, MethodName, methods
from cllm.evaluation.metrics import (
    Estimate,
    accuracy,
    identical_rate,
    paired_difference,
    step_histogram,
    tokens_per_forward,
)
from cllm.evaluation.outputs import ChunkLikelihood, ChunkOutputs, Output
from cllm.evaluation.perplexity import NegativeLogLikelihood
from cllm.evaluation.subject import SUBJECTS, SubjectName
from cllm.evaluation.timing import Timing
from cllm.evaluation.trajectory_counts import add_counts
from cllm.recipe import Recipe
from cllm.tasks.prompts import Prompt

SCHEMA_VERSION = 1
_FOLDERS = re.compile(r"(^|=)/(?:[^/]+/)*")
Key = tuple[SubjectName, MethodName]
# What is compared where one figure stands for a model: the teacher as it was, the student as it will be served.
TEACHER: Key = ("teacher", "ar")
CLLM: Key = ("cllm", "jacobi-sliding")


@dataclass(frozen=True, slots=True)
class Measurements:
    """Everything measured, by (model, method); lists are in the order of `prompts`.

    Attributes:
        scores: the task's score of each output, in [0, 1].
        timings: over the first `num_timed` prompts.
    """

    prompts: list[Prompt]
    outputs: dict[Key, list[Output]]
    scores: dict[Key, list[float]]
    nll: dict[SubjectName, NegativeLogLikelihood]
    timings: dict[Key, Timing]
    num_timed: int


def merge_chunks(
    prompts: Sequence[Prompt], chunks: Iterable[ChunkOutputs | ChunkLikelihood]
) -> tuple[dict[Key, list[Output]], dict[SubjectName, NegativeLogLikelihood]]:
    """Outputs in the order of `prompts`, and total likelihoods, from chunks in any order."""
    found: dict[Key, dict[str, Output]] = {}
    nll = dict.fromkeys(SUBJECTS, NegativeLogLikelihood(0.0, 0))
    for chunk in chunks:
        if isinstance(chunk, ChunkLikelihood):
            nll[chunk.subject] += chunk.nll
        else:
            by_id = zip(chunk.prompt_ids, chunk.outputs, strict=True)
            found.setdefault((chunk.subject, chunk.method), {}).update(by_id)
    ordered = {key: [outputs[prompt.prompt_id] for prompt in prompts] for key, outputs in found.items()}
    return ordered, nll


def build_results(
    recipe: Recipe,
    measured: Measurements,
    *,
    metric: str,
    provenance: Mapping[str, Any],
    weights: Mapping[SubjectName, str],
) -> dict[str, Any]:
    """The results document.

    Args:
        metric: what the task's scores measure.
        weights: model -> what identifies its checkpoint.
    """
    difference = paired_difference(measured.scores[CLLM], measured.scores[TEACHER])
    return {
        "schema_version": SCHEMA_VERSION,
        "task": recipe.task.name,
        "metric": metric,
        "num_prompts": len(measured.prompts),
        "num_timed_prompts": measured.num_timed,
        "rows": [_row(name, method, measured) for name in SUBJECTS for method in methods(recipe.evaluate.block_size)],
        "teacher_tpf": tokens_per_forward(output.accepted for output in measured.outputs["teacher", "jacobi-sliding"]),
        "cllm_minus_teacher": {"difference": difference.mean, "ci95": _interval(difference)},
        "agreement_with_teacher": identical_rate(_tokens(measured, CLLM), _tokens(measured, TEACHER)),
        "weights": dict(weights),
        "recipe": without_folders(recipe.model_dump(mode="json")),
        "provenance": without_folders(dict(provenance)),
    }


def find_row(results: Mapping[str, Any], key: Key) -> dict[str, Any]:
    """The row of one model and method."""
    row: dict[str, Any] = next(row for row in results["rows"] if (row["model"], row["method"]) == key)
    return row


def summarise(results: Mapping[str, Any]) -> dict[str, Any]:
    """The few figures that a program or a hurried reader wants; those of the CLLM are of sliding greedy Jacobi."""
    cllm = find_row(results, CLLM)
    return {
        "task": results["task"],
        "num_prompts": results["num_prompts"],
        "teacher_accuracy": find_row(results, TEACHER)["accuracy"],
        "cllm_accuracy": cllm["accuracy"],
        "teacher_tpf": results["teacher_tpf"],
        "tpf": cllm["tpf"],
        "speedup_over_ar": cllm["speedup_over_ar"],
        "identical_to_ar": cllm["identical_to_ar"],
        "seconds": results["seconds"],
    }


def samples(measured: Measurements) -> list[dict[str, Any]]:
    """One record a prompt: the prompt, the reference, and both models' answers with their scores."""
    columns = (measured.outputs[TEACHER], measured.scores[TEACHER], measured.outputs[CLLM], measured.scores[CLLM])
    return [
        {
            "prompt_id": prompt.prompt_id,
            "prompt": prompt.prompt_text,
            "reference": prompt.reference_text,
            "teacher": teacher.text,
            "teacher_score": teacher_score,
            "cllm": cllm.text,
            "cllm_score": cllm_score,
            "cllm_accepted": list(cllm.accepted),
        }
        for prompt, teacher, teacher_score, cllm, cllm_score in zip(measured.prompts, *columns, strict=True)
    ]


def _row(name: SubjectName, method: Method, measured: Measurements) -> dict[str, Any]:
    key: Key = (name, method.name)
    outputs = measured.outputs[key]
    score = accuracy(measured.scores[key])
    accepted = [output.accepted for output in outputs]
    recorded = [output.counts for output in outputs if output.counts is not None]
    counts = add_counts(recorded) if recorded else None
    timing = measured.timings[key]
    return {
        "model": name,
        "method": method.name,
        "block_size": method.block_size,
        "num_prompts": len(outputs),
        "accuracy": score.mean,
        "ci95": _interval(score),
        "tpf": tokens_per_forward(accepted),
        "tokens_per_s": timing.tokens_per_s,
        "tokens_per_s_spread": list(timing.spread),
        "speedup_over_ar": timing.speedup_over(measured.timings[name, "ar"]),
        "identical_to_ar": identical_rate(_tokens(measured, key), _tokens(measured, (name, "ar"))),
        "perplexity": measured.nll[name].perplexity,
        "fast_forwarded": counts and counts.fast_forwarded,
        "stationary": counts and counts.stationary_per_block,
        "step_histogram": {str(count): forwards for count, forwards in step_histogram(accepted).items()},
        "mean_response_tokens": fmean(len(output.token_ids) for output in outputs),
    }


def _tokens(measured: Measurements, key: Key) -> list[tuple[int, ...]]:
    return [output.token_ids for output in measured.outputs[key]]


def _interval(estimate: Estimate) -> list[float]:
    return [estimate.low, estimate.high]


def without_folders(data: Any) -> Any:
    """Plain data with absolute paths, also those in `key=path`, cut to their last part: results are published, and
    folders name machines and users."""
    if isinstance(data, dict):
        return {key: without_folders(value) for key, value in data.items()}
    if isinstance(data, list):
        return [without_folders(value) for value in data]
    return _FOLDERS.sub(r"\1", data) if isinstance(data, str) else data
