"""The same program scores, and the same function stands in one split."""

import json
from pathlib import Path
from typing import Any

import pytest

from cllm.errors import InputError
from cllm.tasks.codesearchnet import CodeSearchNet, CodeSearchNetConfig, same_program

CODE = 'def add(a, b):\n    """Sum."""\n    return a + b'


def task(path: Path, rows: list[dict[str, Any]], **options: Any) -> CodeSearchNet:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return CodeSearchNet(CodeSearchNetConfig(source=str(path), **options))


@pytest.mark.parametrize(
    ("given", "wanted", "same"),
    [
        (CODE, CODE, True),
        ('def add(a,b):  # two numbers\n  "Sum."\n  return (a+b)\n', CODE, True),
        (CODE.replace("a + b", "b + a"), CODE, False),
        (CODE.replace("add", "sum"), CODE, False),
        ("print 'python 2'\n", "print  'python 2'", True),
        ("print 'python 2'", "print 'python 3'", False),
        (CODE, " ".join(CODE.split()), True),
        ("", CODE, False),
        ("\0", CODE, False),
        ("(" * 5000, CODE, False),
        ("x = '\\d'", "x = '\\\\d'", True),
    ],
)
def test_same_program(given: str, wanted: str, same: bool) -> None:
    assert same_program(given, wanted) is same


def test_score_is_agreement(tmp_path: Path) -> None:
    responses = [CODE + "\n", "def add(a, b): pass"]
    assert task(tmp_path / "a.jsonl", []).score(responses, [CODE, CODE], [{}, {}]) == [1, 0]


@pytest.mark.parametrize(
    "row",
    [
        {"func_documentation_string": " Sum. ", "whole_func_string": CODE},
        {"docstring": "Sum.", "code": CODE},
        {"doc": "Sum.", "code": CODE, "idx": "x", "label": 1},
    ],
)
def test_every_source_format_gives_the_same_example(tmp_path: Path, row: dict[str, Any]) -> None:
    (example,) = task(tmp_path / "a.jsonl", [row]).examples()
    assert example.turns[0].content == "Write a Python function for this description:\nSum.\n\nFunction:\n"
    assert example.response == CODE


def test_one_function_stands_in_one_split_even_with_its_line_breaks_lost(tmp_path: Path) -> None:
    codes = [f"def f{i}():\n    return {i}" for i in range(200)]
    rows = [{"doc": f"{kind} {i}", "code": code} for i, code in enumerate(codes) for kind in ("long", "short")]
    for row in rows[1::2]:
        row["code"] = " ".join(row["code"].split())
    examples = list(task(tmp_path / "a.jsonl", rows, test_fraction=0.3).examples())
    assert [e.split for e in examples[::2]] == [e.split for e in examples[1::2]]
    assert [e.group for e in examples[::2]] == [e.group for e in examples[1::2]]
    assert 0.2 < sum(e.split == "test" for e in examples) / len(examples) < 0.4


def test_rows_whose_description_does_not_match_are_left_out(tmp_path: Path) -> None:
    rows = [{"doc": "a", "code": "x = 1", "label": 0}, {"doc": "b", "code": "x = 2", "label": 1}]
    matched = task(tmp_path / "a.jsonl", rows)
    assert [e.response for e in matched.examples()] == ["x = 2"]
    assert matched.counts == {"label_0": 1}
    assert len(list(task(tmp_path / "a.jsonl", rows, matched_only=False).examples())) == 2


def test_a_folder_gives_its_own_splits(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"doc": split, "code": split}))
    examples = CodeSearchNet(CodeSearchNetConfig(source=str(tmp_path))).examples()
    assert [(e.split, e.response) for e in examples] == [(s, s) for s in ("train", "validation", "test")]


def test_a_row_without_code_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.jsonl:1: no key 'whole_func_string' or 'code'; the row has doc"):
        list(task(tmp_path / "a.jsonl", [{"doc": "x"}]).examples())
