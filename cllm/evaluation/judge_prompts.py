"""What a judge is told. The same four questions as in MT-bench (arXiv 2306.05685), in our own words.

Results hold the messages as they were sent. Other words give other scores, so scores compare only with those of the
same judge under the same prompts, and not with published ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass

Message = dict[str, str]  # "role" and "content", as chat models take them


@dataclass(frozen=True, slots=True)
class Dialogue:
    """What is judged: the questions up to the turn in question, an assistant's answers, and reference answers.

    A reference may be "", for questions that have none.
    """

    questions: tuple[str, ...]
    answers: tuple[str, ...]
    references: tuple[str, ...]


RATE = (
    "You rate how well an assistant answers a user. Be strict and impartial. Look at whether the answer is correct, "
    "whether it does what the user asked for, how useful and how deep it is, and how well it is written. A longer "
    "answer is not a better one by itself. First explain your view in a few sentences. Then give one whole number from "
    "1 (useless) to 10 (cannot be improved), alone on the last line and in exactly this form: [[5]]"
)
COMPARE = (
    "You compare how well two assistants, A and B, answer the same user. Be strict and impartial. Look at whether the "
    "answers are correct, whether they do what the user asked for, how useful and how deep they are, and how well they "
    "are written. Neither the order in which the answers stand, nor their length, nor the assistants' names may count. "
    "First explain your view in a few sentences. Then give your verdict, alone on the last line and in exactly one of "
    "these forms: [[A]] if A is better, [[B]] if B is better, [[C]] if neither is"
)
_LAST_TURN = "Judge the answer to the user's last question only; the turns before it are there to understand it."
_REFERENCE = "Compare with the reference answer, and point out mistakes before you judge."


def rating_messages(dialogue: Dialogue) -> list[Message]:
    """Ask for a rating of the last answer."""
    parts = [*_references(dialogue), _transcript("Assistant", dialogue)]
    return _messages(RATE, dialogue, parts)


def comparison_messages(first: Dialogue, second: Dialogue) -> list[Message]:
    """Ask which last answer to the same questions is better; `first` is shown as A."""
    parts = [*_references(first), _transcript("Assistant A", first), _transcript("Assistant B", second)]
    return _messages(COMPARE, first, parts)


def _messages(instruction: str, dialogue: Dialogue, parts: Sequence[str]) -> list[Message]:
    rules = [instruction]
    if len(dialogue.questions) > 1:
        rules.append(_LAST_TURN)
    if any(dialogue.references):
        rules.append(_REFERENCE)
    return [{"role": "system", "content": "\n\n".join(rules)}, {"role": "user", "content": "\n\n".join(parts)}]


def _references(dialogue: Dialogue) -> list[str]:
    pairs = zip(dialogue.questions, dialogue.references, strict=True)
    lines = [f"### User\n{question}\n\n### Reference answer\n{reference}" for question, reference in pairs if reference]
    return ["\n\n".join(["<reference>", *lines, "</reference>"])] if lines else []


def _transcript(name: str, dialogue: Dialogue) -> str:
    pairs = zip(dialogue.questions, dialogue.answers, strict=True)
    turns = [f"### User\n{question}\n\n### {name}\n{answer}" for question, answer in pairs]
    tag = name.lower().replace(" ", "-")
    return "\n\n".join([f"<{tag}>", *turns, f"</{tag}>"])
