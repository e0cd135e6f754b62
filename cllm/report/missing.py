"""What the results do not hold: cells that failed or cannot run, and what the others were not asked."""

from collections.abc import Sequence

from cllm.bench.matrix import Obstacle
from cllm.bench.matrix_results import MatrixResults
from cllm.report.page import Section, Table, Value


def missing_section(results: MatrixResults) -> Section | None:
    """None where nothing is missing."""
    failed = [(Value(record.cell.title), Value("failed"), Value(record.error or "")) for record in results.failed]
    tables = (
        Table(("cells", "what", "why"), (*failed, *_lines(results.cannot_run, "cannot run")), title="Cells"),
        Table(
            ("asked of", "what", "why"),
            tuple(_lines(results.left_out, "left out")),
            title="Of cells that ran, or can: prompts and corpora",
        ),
    )
    shown = tuple(table for table in tables if table.rows)
    if not shown:
        return None
    text = "Failed cells were tried twice; the next run of the benchmark tries them again."
    return Section("What is missing, and why", (text,) if failed else (), shown)


def _lines(obstacles: Sequence[Obstacle], what: str) -> list[tuple[Value, ...]]:
    return [(Value(str(obstacle).partition(": ")[0]), Value(what), Value(obstacle.why)) for obstacle in obstacles]
