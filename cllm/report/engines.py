"""Rows of the engine benchmark as a table."""

from collections.abc import Sequence
from typing import Any

_NAMES = ("engine", "decoder", "model", "concurrency", "n")
_FIGURES = ("step_ms", "floor_ratio", "tokens_per_s", "tpf", "memory_gib")
_COLUMNS = _NAMES + _FIGURES


def engines_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(_COLUMNS)} |", f"|{'|'.join('---' for _ in _COLUMNS)}|"]
    lines += [f"| {' | '.join(_cell(row[name]) for name in _COLUMNS)} |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return str(value)
