"""Rows come back whole with their origins, and damage is named by file and row."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cllm.errors import InputError
from cllm.tasks.source import find_file, has_split, read_file, read_rows, require, require_any

ROWS = [{"question": "1 + 1?", "answer": "2"}, {"question": 'say "é",\nplease', "answer": "é"}]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows in the format that the name asks for."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        data = sink.getvalue().to_pybytes()
    elif kind == "csv":
        lines = [",".join(rows[0])] + [",".join('"' + v.replace('"', '""') + '"' for v in r.values()) for r in rows]
        data = "\r\n".join(lines).encode()
    else:
        data = (json.dumps(rows) if kind == "json" else "\n".join(json.dumps(row) for row in rows)).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, kind: str, gz: str) -> None:
    path = write(tmp_path / f"train.{kind}{gz}", ROWS)
    assert [row for _, row in read_rows(str(path))] == ROWS
    assert [row for _, row in read_rows(str(tmp_path), "train")] == ROWS


def test_origins_name_file_and_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert list(read_file(path)) == [(f"{path}:1", {"a": 1}), (f"{path}:3", {"a": 2})]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', r"a\.jsonl:2: expected an object, got list"),
        ("a.jsonl", b'{"a": "\xff"}\n', r"a\.jsonl:1: not JSON"),
        ("a.json", b'{"a": 1}', r"a\.json: expected a list of rows, got dict"),
        ("a.json", b'[{"a": 1}, 3]', r"a\.json:2: expected an object, got int"),
        ("a.json", b'[{"a": 1}', r"a\.json: not JSON"),
        ("a.csv", b"a,b\n1,2\n3\n", r"a\.csv:3: the row has not as many fields"),
        ("a.csv", b"a,b\n1,2,3\n", r"a\.csv:2: the row has not as many fields"),
        ("a.csv", b'a,b\n1,"2\n', r"a\.csv:2: not CSV"),
        ("a.parquet", b"PAR1 and no more", r"a\.parquet: not a readable parquet file"),
        ("a.jsonl.gz", b"not gzip", r"a\.jsonl\.gz: cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9, mtime=0)[:-9], r"a\.jsonl\.gz: cannot be read"),
        ("a.txt", b"", r"a\.txt: unknown format"),
    ],
)
def test_damage_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        list(read_file(path))
    assert "\n" not in str(caught.value)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.jsonl: cannot be read"):
        list(read_rows(str(tmp_path / "gone.jsonl")))
    with pytest.raises(InputError, match="no file test or other with one of"):
        read_rows(str(tmp_path), "test", names=("other",))


def test_names_are_looked_for_in_order(tmp_path: Path) -> None:
    write(tmp_path / "b.json", ROWS)
    write(tmp_path / "a.csv.gz", ROWS)
    assert find_file(tmp_path, "a", "b") == tmp_path / "a.csv.gz"
    assert find_file(tmp_path, "c", "b") == tmp_path / "b.json"
    assert find_file(tmp_path, "c") is None


def test_has_split_looks_at_the_folder(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", ROWS)
    assert has_split(str(tmp_path), "train")
    assert not has_split(str(tmp_path), "test")
    with pytest.raises(InputError, match="expected a folder"):
        has_split(str(path), "train")


def test_a_hugging_face_name_is_loaded_by_its_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> list[dict[str, str]]:
        asked.append((args, kwargs))
        return ROWS

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    rows = list(read_rows("owner/name:main", "test"))
    assert rows[1] == ("owner/name:main/test:2", ROWS[1])
    assert asked == [(("owner/name", "main"), {"split": "test", "streaming": False})]


def test_an_unreachable_dataset_is_an_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"owner/name: neither a file nor .*: no route$"):
        list(read_rows("owner/name"))


def test_require_names_key_and_origin() -> None:
    row = {"a": "x", "n": 3}
    assert require(row, "a", str, "f:1") == "x"
    assert require_any(row, ("b", "a"), str, "f:1") == "x"
    with pytest.raises(InputError, match=r"f:1: no key 'b'; the row has a, n"):
        require(row, "b", str, "f:1")
    with pytest.raises(InputError, match=r"f:1: n: expected str, got int 3"):
        require(row, "n", str, "f:1")
    with pytest.raises(InputError, match=r"f:1: no key 'b' or 'c'"):
        require_any(row, ("b", "c"), str, "f:1")
