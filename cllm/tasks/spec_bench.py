"""Spec-Bench: 480 questions of six categories, on which methods of decoding are compared for speed.

Nothing is scored: the answers of an exact method are those of AR, which the benchmark checks by itself.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from cllm.config import Config
from cllm.errors import InputError
from cllm.tasks.base import UNSCORED, Example
from cllm.tasks.mt_bench import conversation, texts
from cllm.tasks.source import read_rows, require

# Rows from MT-bench carry its categories; Spec-Bench counts them as one.
_MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
CATEGORIES = ("mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag")


class SpecBenchConfig(Config):
    """Rows with `category` and one or two questions (`turns`), perhaps with `reference`. All are test rows."""

    name: Literal["spec_bench"] = "spec_bench"
    source: str  # a file, a folder with question.jsonl, or a Hugging Face dataset
    turns: Literal["first", "all"] = "all"  # first: conversations end after one answer, as the plain template needs


class SpecBench:
    """See `cllm.tasks.base.Task`."""

    name = "spec_bench"
    metric = UNSCORED

    def __init__(self, config: SpecBenchConfig) -> None:
        self._config = config
        self.counts = Counter[str]()

    def examples(self) -> Iterator[Example]:
        """The questions, all in `test`. Raises InputError on bad data."""
        for origin, row in read_rows(self._config.source, names=("question",)):
            questions = texts(require(row, "turns", list, origin), f"{origin}: turns")
            if len(questions) not in (1, 2):
                raise InputError(f"{origin}: turns: expected one or two questions, got {len(questions)}")
            category = require(row, "category", str, origin)
            category = "mt_bench" if category in _MT_BENCH else category
            if category not in CATEGORIES:
                raise InputError(f"{origin}: category: {category!r} is none of {', '.join(CATEGORIES)}")
            asked = questions if self._config.turns == "all" else questions[:1]
            yield conversation(asked, category, (_reference(row.get("reference")), ""), origin)

    def score(
        self, responses: Sequence[str], references: Sequence[str], contexts: Sequence[Mapping[str, str]]
    ) -> list[float]:
        """Nothing: there is only speed to measure."""
        return []


def _reference(given: Any) -> str:
    """The first of a row's references where it is a text: some rows have none, and some lists of short answers."""
    first = given[0] if isinstance(given, list) and given else given
    return first if isinstance(first, str) else ""
