"""Answers rated by a language model, as in MT-bench (arXiv 2306.05685): one by one, or against a baseline's.

Who the judge is, and how it is reached, is the caller's business: here it is a function from messages to its reply. A
reply without exactly one verdict counts as unparsed: it is shown, and nothing is guessed from it.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from cllm.config import Config, digest
from cllm.evaluation.judge_prompts import Dialogue, Message, comparison_messages, rating_messages

Complete = Callable[[Sequence[Message]], str]  # the judge
Mode = Literal["single", "pairwise"]
Winner = Literal["answer", "baseline", "tie"]

_RATING = re.compile(r"\[\[\s*([0-9]+(?:\.[0-9]+)?)\s*\]\]")
_VERDICT = re.compile(r"\[\[\s*([ABC])\s*\]\]")


class Judgment(Config):
    """One reply of the judge, with what it was asked, word for word."""

    key: str  # hash of the judge and the messages
    messages: tuple[Message, ...]
    reply: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """A model's answers to one question, or to two.

    Attributes:
        questions, answers, references: a turn each; a reference is "" where there is none.
    """

    category: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    references: tuple[str, ...]

    @property
    def turns(self) -> range:
        """Their numbers, from 1."""
        return range(1, len(self.answers) + 1)

    def until(self, turn: int) -> Dialogue:
        """The first `turn` turns."""
        return Dialogue(self.questions[:turn], self.answers[:turn], self.references[:turn])


@dataclass(frozen=True, slots=True)
class Ratings:
    """Ratings of a model's answers.

    Attributes:
        score: mean of those parsed, 1 to 10, over all turns; None if there are none.
        by_turn: the same for first and second turns.
        by_category: the same for each category.
        silent: keys of the replies without exactly one rating; they are in no mean.
    """

    score: float | None
    by_turn: tuple[float | None, ...]
    by_category: Mapping[str, float | None]
    judgments: tuple[Judgment, ...]
    silent: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A model's answers against a baseline's, each pair shown in both orders.

    Attributes:
        wins, losses: turns that both orders call the same way.
        ties: both orders say so, or they contradict each other: such a verdict follows the place and not the answer.
        unparsed: turns with a reply without exactly one verdict; they are none of the above.
        silent: keys of those replies.
        win_rate: wins and half the ties among the turns with a verdict; None if there are none.
    """

    wins: int
    losses: int
    ties: int
    unparsed: int
    judgments: tuple[Judgment, ...]
    silent: tuple[str, ...]

    @property
    def win_rate(self) -> float | None:
        judged = self.wins + self.losses + self.ties
        return (self.wins + self.ties / 2) / judged if judged else None


class Judge:
    """Asks a judge, and remembers its replies: equal questions are asked once.

    Args:
        complete: the judge; may be called from several threads.
        name: what identifies it, with all that decides its replies: model, endpoint, settings.
        known: judgments of earlier runs.
        keep: called with each new judgment, from the thread that asked for it.
        workers: questions asked at a time.
    """

    def __init__(
        self,
        complete: Complete,
        name: str,
        *,
        known: Iterable[Judgment] = (),
        keep: Callable[[Judgment], None] | None = None,
        workers: int = 1,
    ) -> None:
        self._complete = complete
        self._name = name
        self._keep = keep
        self._workers = workers
        self._known = {judgment.key: judgment for judgment in known}

    def rate(self, conversations: Sequence[Conversation]) -> Ratings:
        """Every answer by itself."""
        asked = [
            (turn, conversation.category, rating_messages(conversation.until(turn)))
            for conversation in conversations
            for turn in conversation.turns
        ]
        judgments = self._ask([messages for _, _, messages in asked])
        found = [
            (turn, category, parse_rating(judgment.reply))
            for (turn, category, _), judgment in zip(asked, judgments, strict=True)
        ]
        turns, categories = sorted({turn for turn, _, _ in found}), sorted({category for _, category, _ in found})
        return Ratings(
            score=_mean(rating for _, _, rating in found),
            by_turn=tuple(_mean(rating for at, _, rating in found if at == turn) for turn in turns),
            by_category={name: _mean(rating for _, its, rating in found if its == name) for name in categories},
            judgments=tuple(judgments),
            silent=tuple(judgment.key for judgment in judgments if parse_rating(judgment.reply) is None),
        )

    def compare(self, conversations: Sequence[Conversation], baseline: Sequence[Conversation]) -> Comparison:
        """Every answer beside the baseline's to the same question, in both orders. Equal answers are ties unasked."""
        pairs = [
            (ours.until(turn), theirs.until(turn))
            for ours, theirs in zip(conversations, baseline, strict=True)
            for turn in ours.turns
        ]
        different = [(ours, theirs) for ours, theirs in pairs if ours.answers != theirs.answers]
        forward = self._ask([comparison_messages(ours, theirs) for ours, theirs in different])
        backward = self._ask([comparison_messages(theirs, ours) for ours, theirs in different])
        judgments = (*forward, *backward)
        winners = [
            winner(parse_verdict(one.reply), parse_verdict(other.reply))
            for one, other in zip(forward, backward, strict=True)
        ]
        return Comparison(
            wins=winners.count("answer"),
            losses=winners.count("baseline"),
            ties=winners.count("tie") + len(pairs) - len(different),
            unparsed=winners.count(None),
            judgments=judgments,
            silent=tuple(judgment.key for judgment in judgments if parse_verdict(judgment.reply) is None),
        )

    def _ask(self, questions: Sequence[Sequence[Message]]) -> list[Judgment]:
        keys = [digest([self._name, list(messages)]) for messages in questions]
        new = {key: messages for key, messages in zip(keys, questions, strict=True) if key not in self._known}
        with ThreadPoolExecutor(self._workers) as pool:
            try:
                for judgment in pool.map(self._judge, new.keys(), new.values()):
                    self._known[judgment.key] = judgment
            except BaseException:
                pool.shutdown(cancel_futures=True)  # what is not asked yet would fail as well, one by one
                raise
        return [self._known[key] for key in keys]

    def _judge(self, key: str, messages: Sequence[Message]) -> Judgment:
        judgment = Judgment(key=key, messages=tuple(messages), reply=self._complete(messages))
        if self._keep is not None:
            self._keep(judgment)
        return judgment


def winner(forward: str | None, backward: str | None) -> Winner | None:
    """Of two verdicts on one pair, the answer shown as A, then as B; None where one of them is unparsed."""
    if forward is None or backward is None:
        return None
    if (forward, backward) == ("A", "B"):
        return "answer"
    return "baseline" if (forward, backward) == ("B", "A") else "tie"


def parse_rating(reply: str) -> float | None:
    """The rating in [[brackets]]; None without one, with several different ones, or with one outside 1 to 10."""
    found = {float(number) for number in _RATING.findall(reply)}
    rating = found.pop() if len(found) == 1 else None
    return rating if rating is not None and 1 <= rating <= 10 else None


def parse_verdict(reply: str) -> str | None:
    """A, B or C (a tie) in [[brackets]]; None without one, or with several different ones."""
    found = set(_VERDICT.findall(reply))
    return found.pop() if len(found) == 1 else None


def _mean(ratings: Iterable[float | None]) -> float | None:
    parsed = [rating for rating in ratings if rating is not None]
    return fmean(parsed) if parsed else None
