"""The records that every task speaks, and the contract that every task keeps."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

Role = Literal["system", "user", "assistant"]
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

JUDGED = "judge's score"  # metric of tasks whose responses only a judge can rate
UNSCORED = "none"  # metric of tasks that measure speed alone

# Keys of a context that other code than the task's own reads.
CATEGORY = "category"  # part of the test set, for figures by category
QUESTION, FOLLOW_UP = "question", "follow_up"  # what the user says first; and after the model's answer
REFERENCE, FOLLOW_UP_REFERENCE = "reference", "follow_up_reference"  # answers that a judge may compare with


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation. `content` is plain text, before any chat template."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """One untokenised question with its reference answer.

    Attributes:
        turns: the conversation up to the question; the last turn is the user's. A task without chat has one turn,
            whose content is the whole prompt, verbatim.
        response: the reference answer, without any end-of-sequence token.
        split: the split it belongs to. A task whose source has no validation split leaves all such rows in `train`;
            `cllm.tasks.splits.assign_splits` carves the validation split out.
        group: what must not cross splits (a database, a conversation, a document); None where the question alone
            identifies the row.
        context: strings that the scorer needs besides the response (database path, gold answer, unit tests).
        origin: where the row came from, "file:row", for error messages.
    """

    turns: tuple[Turn, ...]
    response: str
    split: Split
    group: str | None = None
    context: Mapping[str, str] = field(default_factory=dict)
    origin: str = ""


class Task(Protocol):
    """Rows to examples, and a scorer. One implementation a file, built by `cllm.tasks.registry.load_task`."""

    name: str
    metric: str  # what `score` measures, for tables: "execution accuracy", "test@1", "pass@1", "agreement"; or as above
    counts: Counter[str]  # source rows to which `examples` applied a rule of the task, by rule: what a reader must know

    def examples(self) -> Iterable[Example]:
        """All examples of all splits, in a fixed order.

        Raises:
            InputError: data missing or malformed (file and row named).
        """
        ...

    def score(
        self, responses: Sequence[str], references: Sequence[str], contexts: Sequence[Mapping[str, str]]
    ) -> list[float]:
        """Score decoded responses (no end token) in [0, 1], one a row; bad output scores 0 and never raises.

        Nothing ([]) where the metric is JUDGED or UNSCORED: no number is made up.
        """
        ...
