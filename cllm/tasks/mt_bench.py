"""MT-bench: 80 conversations of two questions, rated by a judge (`cllm.evaluation.judge`).

An example is a conversation's first question. The second one stands in the context, for its prompt holds the model's
own first answer and cannot be made before (`cllm.tasks.prompts.second_turn`).
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from cllm.config import Config
from cllm.errors import InputError
from cllm.tasks.base import CATEGORY, FOLLOW_UP, FOLLOW_UP_REFERENCE, JUDGED, QUESTION, REFERENCE, Example, Turn
from cllm.tasks.source import find_file, read_file, read_rows, require, require_any

# Where the reference answers tell right from wrong; elsewhere they are hints, and judges do not see them.
REFERENCED = frozenset({"math", "reasoning", "coding"})


class MtBenchConfig(Config):
    """Rows with `category` and two questions (`turns` or `prompt`), perhaps with `reference`. All are test rows."""

    name: Literal["mt_bench"] = "mt_bench"
    # A file, a folder with FastChat's question.jsonl and perhaps reference_answer/gpt-4.jsonl, or a Hugging Face name.
    source: str = "HuggingFaceH4/mt_bench_prompts"


class MtBench:
    """See `cllm.tasks.base.Task`."""

    name = "mt_bench"
    metric = JUDGED

    def __init__(self, config: MtBenchConfig) -> None:
        self._config = config
        self.counts = Counter[str]()

    def examples(self) -> Iterator[Example]:
        """The conversations, all in `test`. Raises InputError on bad data."""
        answers = _reference_answers(Path(self._config.source).expanduser())
        for origin, row in read_rows(self._config.source, names=("question",)):
            questions = texts(require_any(row, ("turns", "prompt"), list, origin), f"{origin}: turns")
            if len(questions) != 2:
                raise InputError(f"{origin}: turns: expected two questions, got {len(questions)}")
            given = answers.get(row.get("question_id"), row.get("reference") or [])
            category = require(row, "category", str, origin)
            references = texts(given, f"{origin}: reference") if category in REFERENCED else ["", ""]
            yield conversation(questions, category, [*references, "", ""], origin)

    def score(
        self, responses: Sequence[str], references: Sequence[str], contexts: Sequence[Mapping[str, str]]
    ) -> list[float]:
        """Nothing: that takes a judge."""
        return []


def conversation(questions: Sequence[str], category: str, references: Sequence[str], origin: str) -> Example:
    """A test example of one or two questions; empty references count as none."""
    context = {CATEGORY: category}
    if len(questions) == 2:
        context |= {QUESTION: questions[0], FOLLOW_UP: questions[1]}
    named = zip((REFERENCE, FOLLOW_UP_REFERENCE), references, strict=False)
    context |= {key: text for key, text in named if text}
    return Example((Turn("user", questions[0]),), references[0], "test", context=context, origin=origin)


def texts(values: Any, where: str) -> list[str]:
    """`values`, checked to be a list of strings.

    Raises:
        InputError: it is not.
    """
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise InputError(f"{where}: expected a list of strings, got {values!r:.60}")
    return values


def _reference_answers(source: Path) -> dict[Any, list[str]]:
    """FastChat's reference answers by question id; none where the source is no such folder."""
    path = find_file(source / "reference_answer", "gpt-4")
    if path is None:
        return {}
    answers = {}
    for origin, row in read_file(path):
        choices = require(row, "choices", list, origin)
        if not choices or not isinstance(choices[0], dict):
            raise InputError(f"{origin}: choices: expected a list of objects, got {choices!r:.60}")
        answers[require(row, "question_id", int, origin)] = texts(
            choices[0].get("turns"), f"{origin}: choices[0].turns"
        )
    return answers
