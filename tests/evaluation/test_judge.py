"""Judging: the arithmetic by hand, nothing guessed from replies without a verdict, and nothing asked twice."""

from collections.abc import Sequence
from itertools import product

import pytest

from cllm.errors import InputError
from cllm.evaluation.judge import Conversation, Judge, Judgment, parse_rating, parse_verdict, winner
from cllm.evaluation.judge_prompts import Dialogue, Message, comparison_messages, rating_messages


class Scripted:
    """A judge that finds its reply by a word in the last message, and counts the questions."""

    def __init__(self, **replies: str) -> None:
        self.replies = replies
        self.asked: list[str] = []

    def __call__(self, messages: Sequence[Message]) -> str:
        text = messages[-1]["content"]
        self.asked.append(text)
        return next(reply for word, reply in self.replies.items() if word in text)


def conversation(category: str, *answers: str, references: tuple[str, ...] = ("", "")) -> Conversation:
    questions = ("What is it?", "And then?")[: len(answers)]
    return Conversation(category, questions, answers, references[: len(answers)])


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("It is fine.\n[[7]]", 7),
        ("[[ 7.5 ]]", 7.5),
        ("[[10]]", 10),
        ("[[7]], I repeat: [[7]]", 7),
        ("between [[7]] and [[8]]", None),
        ("[[11]]", None),
        ("[[0]]", None),
        ("[7]", None),
        ("7/10", None),
        ("[[A]]", None),
        ("", None),
    ],
)
def test_ratings_are_read_or_not_guessed(reply: str, rating: float | None) -> None:
    assert parse_rating(reply) == rating


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [("so [[A]]", "A"), ("[[ B ]]", "B"), ("[[C]]", "C"), ("[[A]] or [[B]]", None), ("[[D]]", None), ("A", None)],
)
def test_verdicts_are_read_or_not_guessed(reply: str, verdict: str | None) -> None:
    assert parse_verdict(reply) == verdict


def test_only_verdicts_that_do_not_follow_the_place_decide() -> None:
    found = {pair: winner(*pair) for pair in product("ABC", repeat=2)}
    assert found.pop(("A", "B")) == "answer"
    assert found.pop(("B", "A")) == "baseline"
    assert set(found.values()) == {"tie"}
    assert winner(None, "A") is winner("B", None) is None


def test_means_over_turns_and_categories() -> None:
    # The answers before the one in question stand in the message as well, so "poor" must be looked for first.
    judge = Scripted(poor="no [[3]]", odd="I cannot say", good="fine [[8]]")
    chats = [conversation("math", "good", "poor"), conversation("stem", "odd", "odd too"), conversation("stem", "good")]
    found = Judge(judge, "judge").rate(chats)
    assert found.score == pytest.approx((8 + 3 + 8) / 3)
    assert found.by_turn == (8, 3)
    assert found.by_category == {"math": 5.5, "stem": 8}
    assert len(found.judgments) == 5
    assert len(found.silent) == 2
    silent = [judgment.reply for judgment in found.judgments if judgment.key in found.silent]
    assert silent == ["I cannot say"] * 2


def test_without_a_single_verdict_there_is_no_score() -> None:
    found = Judge(lambda _: "hm", "judge").rate([conversation("math", "x")])
    assert (found.score, found.by_turn, found.by_category) == (None, (None,), {"math": None})
    against = Judge(lambda _: "hm", "judge").compare([conversation("math", "x")], [conversation("math", "y")])
    assert (against.win_rate, against.unparsed, len(against.silent)) == (None, 1, 2)


def test_wins_losses_and_ties_in_both_orders() -> None:
    def judge(messages: Sequence[Message]) -> str:
        """Prefers "better"; likes place A where both are "equal"; says nothing of "odd"."""
        first, _, second = messages[-1]["content"].partition("<assistant-b>")
        if "odd" in second or "odd" in first:
            return "?"
        if "better" in first:
            return "[[A]]"
        return "[[B]]" if "better" in second else "[[A]]"

    ours = [conversation("a", answer) for answer in ("better", "worse", "equal", "odd", "same")]
    theirs = [conversation("a", answer) for answer in ("worse", "better", "equal too", "x", "same")]
    found = Judge(judge, "judge").compare(ours, theirs)
    assert (found.wins, found.losses, found.ties, found.unparsed) == (1, 1, 2, 1)
    assert found.win_rate == 0.5
    assert len(found.judgments) == 8  # equal answers are not asked about


def test_what_is_known_is_not_asked_again() -> None:
    kept: list[Judgment] = []
    judge = Scripted(good="[[8]]")
    chats = [conversation("math", "good"), conversation("math", "good")]
    first = Judge(judge, "judge", keep=kept.append, workers=4).rate(chats)
    assert (len(judge.asked), len(kept)) == (1, 1)
    assert Judge(judge, "judge", known=kept).rate(chats) == first
    assert len(judge.asked) == 1
    Judge(judge, "another judge", known=kept).rate(chats)
    assert len(judge.asked) == 2


def test_an_endpoint_that_fails_ends_it_and_what_was_kept_stays() -> None:
    kept: list[Judgment] = []

    def judge(messages: Sequence[Message]) -> str:
        if "last" in messages[-1]["content"]:
            raise InputError("judge: gone")
        return "[[8]]"

    chats = [conversation("math", f"answer {number}") for number in range(3)] + [conversation("math", "last")]
    with pytest.raises(InputError, match="judge: gone"):
        Judge(judge, "judge", keep=kept.append).rate(chats)
    assert len(kept) == 3


def test_messages_hold_all_turns_and_references_and_name_the_turn() -> None:
    dialogue = Dialogue(("Q1", "Q2"), ("A1", "A2"), ("R1", ""))
    system, user = rating_messages(dialogue)
    assert "last question only" in system["content"]
    assert "reference answer" in system["content"]
    places = [user["content"].index(text) for text in ("R1", "A1", "Q2", "A2")]
    assert places == sorted(places)
    plain = rating_messages(Dialogue(("Q1",), ("A1",), ("",)))
    assert "reference" not in plain[0]["content"] + plain[1]["content"]
    assert "last question only" not in plain[0]["content"]


def test_a_comparison_shows_the_first_as_a() -> None:
    one, other = Dialogue(("Q",), ("ours",), ("",)), Dialogue(("Q",), ("theirs",), ("",))
    text = comparison_messages(one, other)[-1]["content"]
    assert text.index("### Assistant A\nours") < text.index("### Assistant B\ntheirs")
    assert comparison_messages(other, one) != comparison_messages(one, other)
