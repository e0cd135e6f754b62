"""Results of earlier schemas: a document that the first schema's own code wrote, and folders in pieces."""

import json
from pathlib import Path
from typing import Any

import pytest

from cllm.bench.compare import compare
from cllm.bench.convert import convert_record, convert_results, main
from cllm.bench.matrices import get_matrix
from cllm.bench.matrix import Obstacle
from cllm.bench.matrix_results import read_results, write_record, write_results
from cllm.bench.result import SCHEMA_VERSION
from cllm.errors import InputError
from tests.bench.records import BLOCK, failed_record, make_cell, make_record, make_result

WRITTEN_BY_1 = Path(__file__).with_name("results_v1.json")


def written_by_1() -> dict[str, Any]:
    return json.loads(WRITTEN_BY_1.read_text())


def of_version_2(record: dict[str, Any]) -> dict[str, Any]:
    """A record as the second schema had it."""
    cell = {name: value for name, value in record["cell"].items() if name not in ("scorer", "tokenizer", "own_model")}
    result = record["result"] and {
        name: value
        for name, value in record["result"].items()
        if name not in ("engine", "step_ms", "device_memory_gib")
    }
    return record | {"schema_version": 2, "key": "0123456789abcdef", "cell": cell, "result": result}


def test_a_document_of_the_first_schema(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = written_by_1()
    (tmp_path / "results.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=f"this code reads {SCHEMA_VERSION}; convert the folder: python -m cllm.bench"):
        read_results([tmp_path])
    assert main([str(tmp_path)]) == 0
    results = read_results([tmp_path])
    assert [str(obstacle) for obstacle in results.cannot_run] == [
        "demo teacher lookahead W=5 N=5 G=5 c=4: decodes one request at a time"
    ]
    rows = {row.cell.model: row for row in compare(results.records)}
    for old in data["records"]:
        row, before = rows[old["cell"]["model"]], old["result"]
        assert row.result.tokens_per_s == tuple(before["tokens_per_s"])
        assert row.result.scores == tuple(before["scores"])
        assert row.result.response_forwards == ()
        assert row.provenance == old["provenance"]
    assert rows["teacher"].speedup is not None
    assert (tmp_path / "results.parquet").is_file()


def test_cells_get_the_keys_of_today_and_are_converted_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for old in written_by_1()["records"]:
        path = tmp_path / "cells" / f"{old['key']}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(old))
    write_record(tmp_path, make_record())
    assert main([str(tmp_path)]) == 0
    assert main([str(tmp_path)]) == 0
    assert [line.split(": ")[1] for line in capsys.readouterr().out.splitlines()] == [
        f"{count} cells converted to schema {SCHEMA_VERSION}" for count in (2, 0)
    ]
    results = read_results([tmp_path])
    assert len(results.records) == 3
    assert all(record.key == record.cell.key for record in results.records)


def test_of_the_second_schema(tmp_path: Path) -> None:
    done = make_record(result=make_result(memory_gib=12.0)).model_dump(mode="json")
    failed = failed_record(make_cell(BLOCK), "lost").model_dump(mode="json")
    reasons = [
        {"run": "demo", "why": "5 prompts left out: longer than max_prompt_tokens=9"},
        {"run": "demo", "why": "perplexity on ptb: no such file"},
        {"run": "demo", "model": "cllm", "why": "no weights"},
    ]
    data = {"schema_version": 2, "matrices": ["demo"], "records": [], "cannot_run": reasons}
    results = convert_results(data | {"records": [of_version_2(done), of_version_2(failed)]}, where="here")
    one, other = results.records
    assert one.result is not None
    assert (one.result.memory_gib, one.result.device_memory_gib) == (None, 12.0)
    assert (other.status, other.error, other.result) == ("failed", "lost", None)
    assert [obstacle.why for obstacle in results.cannot_run] == ["no weights"]
    assert len(results.left_out) == 2


def test_a_judges_scores_follow_the_cells(tmp_path: Path) -> None:
    record = of_version_2(make_record().model_dump(mode="json"))
    data = {"schema_version": 2, "matrices": ["demo"], "records": [record]}
    (tmp_path / "results.json").write_text(json.dumps(data))
    (tmp_path / "judge.json").write_text(json.dumps({"cells": [{"key": record["key"], "baseline": None}]}))
    assert main([str(tmp_path)]) == 0
    (cell,) = json.loads((tmp_path / "judge.json").read_text())["cells"]
    assert cell == {"key": read_results([tmp_path]).records[0].key, "baseline": None}


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1, None, "2"])
def test_schemas_that_nobody_knows(version: object) -> None:
    with pytest.raises(InputError, match=f"here: schema version {version}; known are 1 to {SCHEMA_VERSION}"):
        convert_record(make_record().model_dump(mode="json") | {"schema_version": version}, where="here")


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "absent")]) == 2
    (tmp_path / "results.json").write_text("{")
    assert main([str(tmp_path)]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "no such folder" in first
    assert "not a readable JSON file" in second


def test_a_folder_of_cells_alone_is_read(tmp_path: Path) -> None:
    """A benchmark that was killed before it wrote the document."""
    write_record(tmp_path / "killed", make_record())
    results = read_results([tmp_path / "killed"])
    assert (results.matrices, len(results.records)) == (("killed",), 1)


def test_cells_put_beside_a_document_are_read(tmp_path: Path) -> None:
    write_record(tmp_path, failed_record(make_cell(BLOCK), "lost"))
    write_results(tmp_path, get_matrix("demo"), [Obstacle(run="demo", why="none")])
    write_record(tmp_path, make_record())
    write_record(tmp_path, make_record(make_cell(BLOCK)))
    results = read_results([tmp_path])
    assert [record.status for record in results.records] == ["done", "done"]
    assert results.cannot_run == (Obstacle(run="demo", why="none"),)
