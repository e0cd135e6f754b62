"""What a judge says of the answers to MT-bench."""

from collections.abc import Mapping, Sequence

from cllm.bench.judged import JudgedCell, JudgeResults
from cllm.evaluation.metrics import accuracy
from cllm.report.page import NOTHING, Absent, Section, Table, Value
from cllm.report.values import number, percent_interval

_TITLE = "MT-bench by a judge"


def judged_section(judged: Sequence[JudgeResults]) -> Section | Absent:
    """Scores of single answers (1 to 10), and answers against those of the teacher by AR."""
    if not judged:
        return Absent(_TITLE, "no judge.json beside the results; run jobs/judge.py, which needs a judge's endpoint")
    tables = [table for results in judged for table in (_single_table(results), _pairwise_table(results))]
    missing = tuple(f"Not judged: {text}" for results in judged for text in results.not_judged)
    notes = (
        "Judged: turns. Without a verdict: replies of the judge in which none could be read; they are in no score.",
        "Win rate: wins and half the ties over all verdicts, each pair judged in both orders, with Wilson's 95% "
        "interval. The judge's messages and replies stand word for word in judge.json.",
    )
    return Section(_TITLE, (), tuple(table for table in tables if table.rows), (*notes, *missing))


def mt_bench_scores(judged: Sequence[JudgeResults]) -> dict[str, float]:
    """Key of a cell -> its score from 1 to 10."""
    cells = [cell for results in judged for cell in results.cells]
    return {cell.key: cell.score for cell in cells if cell.score is not None}


def _single_table(results: JudgeResults) -> Table:
    cells = [cell for cell in results.cells if cell.mode == "single"]
    categories = sorted({name for cell in cells for name in cell.by_category or {}})
    turns = range(max((len(cell.by_turn or ()) for cell in cells), default=0))
    figures = ("score", *(f"turn {turn + 1}" for turn in turns), *categories, "judged", "without a verdict")
    lines = tuple(
        (
            *_names(cell),
            number(cell.score, 2),
            *(number(_turn(cell, turn), 2) for turn in turns),
            *(_category(cell.by_category or {}, name) for name in categories),
            number(cell.judged, 0),
            number(cell.unparsed, 0),
        )
        for cell in cells
    )
    title = f"Single answers, 1 to 10, by {results.judge.title}"
    return Table(("method", "model", "run", *figures), lines, frozenset(figures), title)


def _pairwise_table(results: JudgeResults) -> Table:
    cells = [cell for cell in results.cells if cell.mode == "pairwise"]
    figures = ("win rate (95% CI)", "wins", "ties", "losses", "judged", "without a verdict")
    lines = tuple(
        (
            *_names(cell),
            _win_rate(cell),
            *(number(count, 0) for count in (cell.wins, cell.ties, cell.losses, cell.judged, cell.unparsed)),
        )
        for cell in cells
    )
    title = f"Against the teacher by AR, by {results.judge.title}"
    return Table(("method", "model", "run", *figures), lines, frozenset(figures), title)


def _names(cell: JudgedCell) -> tuple[Value, ...]:
    return Value(cell.method), Value(cell.model), Value(cell.run)


def _turn(cell: JudgedCell, turn: int) -> float | None:
    scores = cell.by_turn or ()
    return scores[turn] if turn < len(scores) else None


def _category(scores: Mapping[str, float | None], name: str) -> Value:
    return number(scores.get(name), 2)


def _win_rate(cell: JudgedCell) -> Value:
    verdicts = (1.0,) * (cell.wins or 0) + (0.5,) * (cell.ties or 0) + (0.0,) * (cell.losses or 0)
    return percent_interval(accuracy(verdicts)) if verdicts else NOTHING
