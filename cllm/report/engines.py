"""Rows of the engine benchmark as a table."""

from collections.abc import Sequence
from typing import Any

from cllm.report.tables import markdown_table

_NAMES = ("engine", "decoder", "model", "concurrency", "n", "gpus")
_FIGURES = ("step_ms", "steps_per_s", "floor_ratio", "tokens_per_s", "tpf", "memory_gib")


def engines_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    columns = _NAMES + _FIGURES
    return markdown_table(columns, ([_cell(row.get(name)) for name in columns] for row in rows), _FIGURES)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return str(value)
