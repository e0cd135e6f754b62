"""Conversations in ShareGPT form.

The metric is exact agreement with the reference answer, which says whether two decoders give the same text; it does not
say whether a chat answer is good. That needs a judge and is not measured here.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from cllm.config import Config, digest
from cllm.errors import InputError
from cllm.tasks.base import Example, Role, Split, Turn
from cllm.tasks.source import read_rows, require

_ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
}


class ShareGptConfig(Config):
    """Rows with `conversations`, a list of `{"from": role, "value": text}`, and perhaps `id`."""

    name: Literal["sharegpt"] = "sharegpt"
    source: str  # a file, a folder with a train file, or a Hugging Face dataset
    turns: Literal["first", "all"] = "first"  # all: each assistant turn is an example, with the turns before it
    max_prompt_chars: int = Field(1024, ge=1)  # longer prompts, all turns together, are left out, as in the paper
    test_fraction: float = Field(0.05, gt=0, lt=1)  # of the conversations, drawn by hashed id
    other_roles: Literal["skip", "error"] = "skip"  # conversations with roles beside system, user and assistant


class ShareGpt:
    """See `cllm.tasks.base.Task`."""

    name = "sharegpt"
    metric = "agreement"

    def __init__(self, config: ShareGptConfig) -> None:
        self._config = config
        self.counts = Counter[str]()

    def examples(self) -> Iterator[Example]:
        """Train and test examples; conversations left out for their roles are counted.

        Raises:
            InputError: missing or malformed data, or, with `other_roles="error"`, another role.
        """
        self.counts.clear()
        for origin, row in read_rows(self._config.source, "train"):
            messages = _messages(row, origin)
            other = sorted({role for role, _ in messages} - _ROLES.keys())
            if other and self._config.other_roles == "error":
                raise InputError(f"{origin}: conversations: role {other[0]!r} is none of {', '.join(_ROLES)}")
            if other:
                self.counts["other_roles"] += 1
                continue
            turns = _alternating([Turn(_ROLES[role], text) for role, text in messages])
            yield from self._conversation(turns, _conversation_id(row, turns), origin)

    def score(
        self, responses: Sequence[str], references: Sequence[str], contexts: Sequence[Mapping[str, str]]
    ) -> list[float]:
        """1 where the response is the reference, apart from whitespace at its ends."""
        return [float(given.strip() == wanted.strip()) for given, wanted in zip(responses, references, strict=True)]

    def _conversation(self, turns: Sequence[Turn], group: str, origin: str) -> Iterator[Example]:
        split: Split = "test" if _share(group) < self._config.test_fraction else "train"
        for position in range(1, len(turns)):
            before, turn = turns[:position], turns[position]
            if turn.role != "assistant" or not turn.content.strip():
                continue
            if sum(len(other.content) for other in before) > self._config.max_prompt_chars:
                return  # later prompts only grow
            yield Example(turns=tuple(before), response=turn.content, split=split, group=group, origin=origin)
            if self._config.turns == "first":
                return


def _messages(row: Mapping[str, Any], origin: str) -> list[tuple[str, str]]:
    """The (role, text) pairs of a row, roles as written."""
    items = require(row, "conversations", list, origin)
    if not items:
        raise InputError(f"{origin}: conversations: is empty")
    messages = []
    for number, item in enumerate(items):
        where = f"{origin}: conversations[{number}]"
        if not isinstance(item, dict):
            raise InputError(f"{where}: expected an object, got {type(item).__name__}")
        messages.append((require(item, "from", str, where), require(item, "value", str, where)))
    return messages


def _alternating(turns: Sequence[Turn]) -> list[Turn]:
    """The longest start of the conversation, without assistant turns before the first question, that takes turns.

    ShareGPT cuts long conversations in pieces, so some open with an answer; chat templates refuse those.
    """
    kept: list[Turn] = []
    for turn in turns:
        last = kept[-1].role if kept else None
        if turn.role == "assistant" and last in (None, "system"):
            continue
        if turn.role == last or (turn.role == "system" and kept):
            break
        kept.append(turn)
    return kept


def _conversation_id(row: Mapping[str, Any], turns: Sequence[Turn]) -> str:
    given = row.get("id")
    return str(given) if given is not None else digest([[turn.role, turn.content] for turn in turns])


def _share(group: str) -> float:
    """A number in [0, 1) that depends on the conversation alone, so that it keeps its split when others come or go."""
    return int(digest(group), 16) / 16**16
