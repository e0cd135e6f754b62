"""GSM8K: grade-school word problems; test@1 is the exact match of the final number."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Literal

from cllm.config import Config
from cllm.errors import InputError
from cllm.tasks.base import SPLITS, Example, Turn
from cllm.tasks.source import has_split, read_rows, require

_MARK = re.compile(r"<<[^<>\n]*>>")
# A hyphen behind a digit, a letter or a bracket is a minus between two numbers, not a sign.
_SIGN = r"(?:(?<![\w)])[-\u2212])?"
_DECIMAL = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_NUMBER = re.compile(rf"({_SIGN})\$?\s?({_SIGN})({_DECIMAL})(?:\s?/\s?([0-9]+))?")


class Gsm8kConfig(Config):
    """Rows with `question` and `answer`, whose last line is "#### NUMBER"."""

    name: Literal["gsm8k"] = "gsm8k"
    source: str  # a folder with train and test files, or a Hugging Face dataset ("openai/gsm8k:main")
    strip_calculator_marks: bool = True  # drop <<3*4=12>> from the answers that are trained on


class Gsm8k:
    """See `cllm.tasks.base.Task`."""

    name = "gsm8k"
    metric = "test@1"

    def __init__(self, config: Gsm8kConfig) -> None:
        self._config = config
        self.counts = Counter[str]()

    def examples(self) -> Iterator[Example]:
        """The splits that the source has. Raises InputError on missing or malformed data."""
        splits = [split for split in SPLITS if has_split(self._config.source, split)]
        if not splits:
            raise InputError(f"task.source: {self._config.source} has none of the splits {', '.join(SPLITS)}")
        for split in splits:
            for origin, row in read_rows(self._config.source, split):
                answer = require(row, "answer", str, origin)
                gold = final_number(answer)
                if "####" not in answer or gold is None:
                    raise InputError(f"{origin}: answer: no final line '#### NUMBER'")
                question = require(row, "question", str, origin)
                yield Example(
                    turns=(Turn("user", f"Question: {question}\nAnswer:\n"),),
                    response=_MARK.sub("", answer) if self._config.strip_calculator_marks else answer,
                    split=split,
                    context={"gold": gold},
                    origin=origin,
                )

    def score(
        self, responses: Sequence[str], references: Sequence[str], contexts: Sequence[Mapping[str, str]]
    ) -> list[float]:
        """1 where the final number equals the gold one (in the context, or else the reference's)."""
        golds = [
            context.get("gold") or final_number(reference)
            for reference, context in zip(references, contexts, strict=True)
        ]
        return [
            float(gold is not None and final_number(response) == gold)
            for response, gold in zip(responses, golds, strict=True)
        ]


def final_number(text: str) -> str | None:
    """The answer of a solution: the first number after the last "####"; without that mark, the last number at all.

    Normalised, so that equal numbers are equal strings: no currency, percent or thousands signs, decimals and
    fractions in lowest terms ("$1,200.00." is "1200", "0.5" is "1/2"). None if there is no number.
    """
    _, mark, tail = text.rpartition("####")
    numbers = _NUMBER.findall(_MARK.sub("", tail))
    if not numbers:
        return None
    outer_sign, inner_sign, digits, denominator = numbers[0] if mark else numbers[-1]
    try:
        value = Fraction(digits.replace(",", "")) / int(denominator or 1)
    except (ValueError, ZeroDivisionError):  # thousands of digits, which int() refuses, or a division by zero
        return None
    return str(-value if outer_sign or inner_sign else value)
