"""Responses of a matrix as conversations that a judge can rate, and what came of it as one document.

A cell's responses are rated at its smallest number of requests in flight: at others they are the same but for rounding.
Every judge has a file of its own beside the results, to which later modes and later cells are added.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cllm.bench.compare import newest
from cllm.bench.matrix_results import MatrixResults
from cllm.bench.result import CellRecord, CellResult
from cllm.bench.versioned import read_versioned
from cllm.config import Config
from cllm.errors import InputError
from cllm.evaluation.judge import Comparison, Conversation, Judgment, Mode, Ratings, parse_rating
from cllm.tasks.base import CATEGORY, FOLLOW_UP, FOLLOW_UP_REFERENCE, REFERENCE, Example
from cllm.tasks.mt_bench import MtBench, MtBenchConfig
from cllm.tasks.prompts import second_turn_id
from cllm.tasks.splits import example_id

SCHEMA_VERSION = 1
JUDGE_NAME = "judge.json"  # of the first judge; a further one's name has a hash of its settings


class JudgeSettings(Config):
    """Who judges; together with the messages it decides a reply."""

    model: str
    endpoint: str
    temperature: float = 0.0
    max_tokens: int = 1024

    @property
    def title(self) -> str:
        return f"{self.model} at {self.endpoint}"


class JudgedCell(Config):
    """One cell judged. Fields of the other mode are None.

    Attributes:
        key, baseline: of the cell, and of the teacher's AR cell that it was compared with.
        score, by_turn, by_category: 1 to 10 (mode single).
        ratings: of each turn, in the order in which they were judged (the turns of a conversation follow each other);
            None for one without a verdict (mode single).
        wins, losses, ties, win_rate: against the baseline (mode pairwise).
        judged: turns.
        unparsed: turns without a verdict; they are in no score.
        silent: keys of the replies without one.
    """

    key: str
    run: str
    task: str
    model: str
    method: str
    concurrency: int
    seed: int
    mode: Mode
    judged: int
    unparsed: int
    silent: tuple[str, ...]
    score: float | None = None
    by_turn: tuple[float | None, ...] | None = None
    by_category: Mapping[str, float | None] | None = None
    ratings: tuple[float | None, ...] | None = None
    baseline: str | None = None
    wins: int | None = None
    losses: int | None = None
    ties: int | None = None
    win_rate: float | None = None


class JudgeResults(Config):
    """All of it: scores, the judge, and every message and reply word for word."""

    schema_version: int = SCHEMA_VERSION
    judge: JudgeSettings
    cells: tuple[JudgedCell, ...]
    not_judged: tuple[str, ...]
    judgments: tuple[Judgment, ...]
    provenance: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Answers:
    """A cell with its responses as conversations, in the order of the questions' ids."""

    record: CellRecord
    conversations: tuple[Conversation, ...]


def answers_of(results: MatrixResults, source: str) -> list[Answers]:
    """The cells that are to be judged.

    Args:
        source: MT-bench's questions, as in `MtBenchConfig`.

    Raises:
        InputError: there is nothing to judge, or a cell answered a question that the source does not have.
    """
    smallest: dict[tuple[object, ...], CellRecord] = {}
    for record in newest(results.records):
        cell = record.cell
        if record.result is None or not record.result.responses:
            continue
        name = (*_load(record), cell.model, cell.method.label)
        known = smallest.setdefault(name, record)
        if cell.concurrency < known.cell.concurrency:
            smallest[name] = record
    if not smallest:
        raise InputError("the results hold no responses to judge: no finished cell has a test set such as mt_bench")
    questions = {
        example_id(MtBench.name, example): example for example in MtBench(MtBenchConfig(source=source)).examples()
    }
    return [Answers(record, _conversations(record, questions, source)) for record in smallest.values()]


def baseline_of(answers: Answers, all_answers: Sequence[Answers]) -> Answers | None:
    """The teacher's AR responses to the same questions; None where they are missing, or these are they."""
    for other in all_answers:
        is_teacher = (other.record.cell.model, other.record.cell.method.kind) == ("teacher", "ar")
        if is_teacher and _load(other.record) == _load(answers.record) and other is not answers:
            return other
    return None


def _load(record: CellRecord) -> tuple[object, ...]:
    """What was asked of whom, and how."""
    cell = record.cell
    return cell.run, cell.task, cell.test, cell.data, cell.load, cell.seed, cell.platform.device, cell.platform.threads


def rated(answers: Answers, ratings: Ratings) -> JudgedCell:
    return JudgedCell(
        **_names(answers.record),
        mode="single",
        judged=len(ratings.judgments),
        unparsed=len(ratings.silent),
        silent=ratings.silent,
        score=ratings.score,
        by_turn=ratings.by_turn,
        by_category=ratings.by_category,
        ratings=tuple(parse_rating(judgment.reply) for judgment in ratings.judgments),
    )


def compared(answers: Answers, baseline: Answers, found: Comparison) -> JudgedCell:
    return JudgedCell(
        **_names(answers.record),
        mode="pairwise",
        judged=found.wins + found.losses + found.ties + found.unparsed,
        unparsed=found.unparsed,
        silent=found.silent,
        baseline=baseline.record.key,
        wins=found.wins,
        losses=found.losses,
        ties=found.ties,
        win_rate=found.win_rate,
    )


def merged(earlier: JudgeResults | None, later: JudgeResults, current: Collection[str]) -> JudgeResults:
    """Scores of the same judge as one document: a cell judged again in the same mode replaces the first one.

    Args:
        current: keys of the cells whose answers count today; others are left out.
    """
    if earlier is None:
        return later
    judged = {(cell.key, cell.mode): cell for cell in (*earlier.cells, *later.cells) if cell.key in current}
    modes = {cell.mode for cell in later.cells}
    reasons = [text for text in earlier.not_judged if not any(f", {mode}: " in text for mode in modes)]
    judgments = {judgment.key: judgment for judgment in (*earlier.judgments, *later.judgments)}
    return later.model_copy(
        update={
            "cells": tuple(judged.values()),
            "not_judged": tuple(dict.fromkeys((*reasons, *later.not_judged))),
            "judgments": tuple(judgments.values()),
        }
    )


def judge_files(folder: Path) -> list[Path]:
    """What judges have said of a folder's results, a file each."""
    stem, suffix = JUDGE_NAME.split(".")
    return [*filter(Path.exists, [folder / JUDGE_NAME]), *sorted(folder.glob(f"{stem}-*.{suffix}"))]


def file_of(folder: Path, judge: JudgeSettings) -> tuple[Path, JudgeResults | None]:
    """A judge's file, and what stands in it already.

    Raises:
        InputError: a file of a judge that is damaged or of another schema version.
    """
    for path in judge_files(folder):
        found = read_judged(path)
        if found.judge == judge:
            return path, found
    first = folder / JUDGE_NAME
    stem, suffix = JUDGE_NAME.split(".")
    return (folder / f"{stem}-{judge.fingerprint()}.{suffix}" if first.exists() else first), None


def read_judged(path: Path) -> JudgeResults:
    """Raises InputError if the file is missing or damaged, or of another schema version."""
    way = "run jobs/judge.py again"
    return JudgeResults.from_data(read_versioned(path, SCHEMA_VERSION, outdated=way, missing=way), where=str(path))


def _names(record: CellRecord) -> dict[str, Any]:
    cell = record.cell
    names = {name: getattr(cell, name) for name in ("key", "run", "task", "model", "concurrency", "seed")}
    return names | {"method": cell.method.label}


def _conversations(record: CellRecord, questions: Mapping[str, Example], source: str) -> tuple[Conversation, ...]:
    assert record.result is not None
    responses = _by_prompt(record.result)
    second = {second_turn_id(prompt_id) for prompt_id in responses}
    unknown = [prompt_id for prompt_id in responses if prompt_id not in questions and prompt_id not in second]
    if unknown:
        raise InputError(f"{source}: has no question with the id {unknown[0]}, which {record.cell.title} answered")
    first = sorted(prompt_id for prompt_id in responses if prompt_id not in second)
    return tuple(_conversation(questions[prompt_id], prompt_id, responses) for prompt_id in first)


def _by_prompt(result: CellResult) -> dict[str, str]:
    return dict(zip(result.prompt_ids, result.responses, strict=True))


def _conversation(example: Example, prompt_id: str, responses: Mapping[str, str]) -> Conversation:
    context, later = example.context, second_turn_id(prompt_id)
    turns = [(example.turns[-1].content, responses[prompt_id], context.get(REFERENCE, ""))]
    if later in responses:
        turns.append((context[FOLLOW_UP], responses[later], context.get(FOLLOW_UP_REFERENCE, "")))
    questions, answers, references = zip(*turns, strict=True)
    return Conversation(context[CATEGORY], questions, answers, references)
