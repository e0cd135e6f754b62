"""The final number decides, however it is written."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm.errors import InputError
from cllm.tasks.gsm8k import Gsm8k, Gsm8kConfig, final_number

ANSWER = "She has 3*4=<<3*4=12>>12 eggs.\nThat is $<<12*2=24>>24.\n#### 24"


def task(folder: Path, *, strip: bool = True) -> Gsm8k:
    row = json.dumps({"question": "How many?", "answer": ANSWER})
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(row + "\n")
    return Gsm8k(Gsm8kConfig(source=str(folder), strip_calculator_marks=strip))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so\n#### 1,200", "1200"),
        ("#### $18.", "18"),
        ("#### 3.0", "3"),
        ("#### -7", "-7"),
        ("#### -$7.50", "-15/2"),
        ("#### $-7", "-7"),
        ("#### \u22127", "-7"),
        ("#### 50%", "50"),
        ("#### 1/2", "1/2"),
        ("#### 0.5", "1/2"),
        ("#### 6 / 4", "3/2"),
        ("#### .25", "1/4"),
        ("#### 007", "7"),
        ("#### **18**", "18"),
        ("**#### 18.**", "18"),
        ("#### €3.50", "7/2"),
        ("####18", "18"),
        ("#### 18\n#### ", None),
        ("The answer is \\boxed{42}.", "42"),
        ("#### 1,234,567.89", "123456789/100"),
        ("#### 12 apples, not 13", "12"),
        ("#### 1 then #### 2", "2"),
        ("the answer is 5, or 1,000 in all.", "1000"),
        ("9-4", "4"),
        ("9 - 4 = 5", "5"),
        ("10,5", "5"),
        ("12<<3*4=13>>", "12"),
        ("5/0", None),
        ("#### none", None),
        ("no number", None),
        ("", None),
        ("9" * 5000, None),
    ],
)
def test_final_number(text: str, number: str | None) -> None:
    assert final_number(text) == number


@given(st.text(alphabet="0123456789-$,./# <>%a\n", max_size=60))
def test_any_response_is_scored_without_raising(text: str) -> None:
    number = final_number(text)
    assert number is None or final_number(number) == number


def test_score_is_the_exact_match_of_the_number(tmp_path: Path) -> None:
    responses = ["#### 24.00", "It is 24 dollars", "#### 25", "", "24 at first\n#### 12"]
    contexts = [{"gold": "24"}] * len(responses)
    assert task(tmp_path).score(responses, [ANSWER] * len(responses), contexts) == [1, 1, 0, 0, 0]


def test_score_reads_the_reference_where_the_context_has_no_gold(tmp_path: Path) -> None:
    assert task(tmp_path).score(["#### 24", "#### 2"], [ANSWER, ANSWER], [{}, {}]) == [1, 0]


@pytest.mark.parametrize("strip", [True, False])
def test_calculator_marks_leave_the_response_if_asked(tmp_path: Path, strip: bool) -> None:
    train, test = task(tmp_path, strip=strip).examples()
    assert (train.split, test.split) == ("train", "test")
    assert train.turns[0].content == "Question: How many?\nAnswer:\n"
    assert train.context == {"gold": "24"}
    assert train.response == ("She has 3*4=12 eggs.\nThat is $24.\n#### 24" if strip else ANSWER)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "answer": "12"}, r"train\.jsonl:1: answer: no final line"),
        ({"question": "q", "answer": "#### x"}, r"train\.jsonl:1: answer: no final line"),
        ({"answer": "#### 1"}, r"train\.jsonl:1: no key 'question'"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: dict[str, str], message: str) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match=message):
        list(Gsm8k(Gsm8kConfig(source=str(tmp_path))).examples())


def test_a_folder_without_splits_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"task\.source: .* none of the splits"):
        list(Gsm8k(Gsm8kConfig(source=str(tmp_path))).examples())
