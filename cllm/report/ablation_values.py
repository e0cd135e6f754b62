"""Settings of an ablation in tables."""

from collections.abc import Sequence

from cllm.ablation.document import AblationDocument
from cllm.ablation.grid import Setting
from cllm.report.sources import Sources


def title_of(ablation: AblationDocument, sources: Sources) -> str:
    """Of a table of the whole ablation, with where its students are from."""
    numbers = sources.of_provenances(ablation.sources).text
    return f"{ablation.title} ({'sources' if ',' in numbers else 'source'} {numbers})"


def ascending(levels: Sequence[Setting]) -> list[Setting]:
    """Numbers in their order, texts as they stand, after them."""
    return sorted(levels, key=lambda level: float("inf") if isinstance(level, str) else level)


def order(level: Setting) -> float | None:
    """What a level sorts by; None: its text."""
    return None if isinstance(level, str) else level
