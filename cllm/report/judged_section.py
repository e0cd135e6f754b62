"""What a judge says of the answers to MT-bench."""

from collections.abc import Mapping, Sequence

from cllm.bench.judged import JudgedCell, JudgeResults
from cllm.evaluation.metrics import Estimate, accuracy, ratio_of_sums
from cllm.report.page import NOTHING, Absent, Section, Table, Value
from cllm.report.sources import COLUMN, Sources
from cllm.report.values import interval, number, percent_interval

_TITLE = "MT-bench by a judge"


def judged_section(judged: Sequence[JudgeResults], sources: Sources) -> Section | Absent:
    """Scores of single answers (1 to 10), and answers against those of the teacher by AR."""
    if not judged:
        return Absent(_TITLE, "no judge.json beside the results; run jobs/judge.py, which needs a judge's endpoint")
    tables = [
        table for results in judged for table in (_single_table(results, sources), _pairwise_table(results, sources))
    ]
    missing = tuple(f"Not judged: {text}" for results in judged for text in results.not_judged)
    notes = (
        "Score: mean over all turns with a verdict, with its 95% interval over conversations. Judged: turns. Without a "
        "verdict: replies of the judge in which none could be read; they are in no score.",
        "Win rate: wins and half the ties over all verdicts, each pair judged in both orders, with Wilson's 95% "
        "interval. The judge's messages and replies stand word for word in judge.json.",
    )
    return Section(_TITLE, (), tuple(table for table in tables if table.rows), (*notes, *missing))


def mt_bench_scores(judged: Sequence[JudgeResults]) -> dict[str, Estimate]:
    """Key of a cell -> its score from 1 to 10, by the last judge."""
    found = ((cell.key, _score(cell)) for results in judged for cell in results.cells)
    return {key: score for key, score in found if score is not None}


def _score(cell: JudgedCell) -> Estimate | None:
    """With its interval; without one where the document holds no ratings."""
    if cell.score is None:
        return None
    if not cell.ratings:
        return Estimate(cell.score, cell.score, cell.score)
    turns = len(cell.by_turn or (None,))
    # The turns of a conversation stand together; they are no independent ratings.
    talks = [cell.ratings[start : start + turns] for start in range(0, len(cell.ratings), turns)]
    known = [[rating for rating in talk if rating is not None] for talk in talks]
    known = [talk for talk in known if talk]
    return ratio_of_sums([sum(talk) for talk in known], [len(talk) for talk in known])


def _single_table(results: JudgeResults, sources: Sources) -> Table:
    cells = [cell for cell in results.cells if cell.mode == "single"]
    categories = sorted({name for cell in cells for name in cell.by_category or {}})
    turns = range(max((len(cell.by_turn or ()) for cell in cells), default=0))
    turn_heads = tuple(f"turn {turn + 1}" for turn in turns)
    figures = ("score (95% CI)", *turn_heads, *categories, "judged", "without a verdict", COLUMN)
    lines = tuple(
        (
            *_names(cell),
            _interval(_score(cell)),
            *(number(_turn(cell, turn), 2) for turn in turns),
            *(_category(cell.by_category or {}, name) for name in categories),
            number(cell.judged, 0),
            number(cell.unparsed, 0),
            sources.of_provenances([results.provenance]),
        )
        for cell in cells
    )
    title = f"Single answers, 1 to 10, by {results.judge.title}"
    return Table(("method", "model", "run", *figures), lines, frozenset(figures), title)


def _pairwise_table(results: JudgeResults, sources: Sources) -> Table:
    cells = [cell for cell in results.cells if cell.mode == "pairwise"]
    figures = ("win rate (95% CI)", "wins", "ties", "losses", "judged", "without a verdict", COLUMN)
    lines = tuple(
        (
            *_names(cell),
            _win_rate(cell),
            *(number(count, 0) for count in (cell.wins, cell.ties, cell.losses, cell.judged, cell.unparsed)),
            sources.of_provenances([results.provenance]),
        )
        for cell in cells
    )
    title = f"Against the teacher by AR, by {results.judge.title}"
    return Table(("method", "model", "run", *figures), lines, frozenset(figures), title)


def _names(cell: JudgedCell) -> tuple[Value, ...]:
    return Value(cell.method), Value(cell.model), Value(cell.run)


def _interval(score: Estimate | None) -> Value:
    return number(score.mean, 2) if score is not None and score.low == score.high else interval(score, 2)


def _turn(cell: JudgedCell, turn: int) -> float | None:
    scores = cell.by_turn or ()
    return scores[turn] if turn < len(scores) else None


def _category(scores: Mapping[str, float | None], name: str) -> Value:
    return number(scores.get(name), 2)


def _win_rate(cell: JudgedCell) -> Value:
    verdicts = (1.0,) * (cell.wins or 0) + (0.5,) * (cell.ties or 0) + (0.0,) * (cell.losses or 0)
    return percent_interval(accuracy(verdicts)) if verdicts else NOTHING
