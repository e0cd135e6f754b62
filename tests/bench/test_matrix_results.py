"""Records on disk: whole, checked, merged; and the statistics made of them, by hand."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cllm.bench.compare import Ratio, compare, speed_ratio
from cllm.bench.matrices import get_matrix
from cllm.bench.matrix import LoadConfig, Obstacle, Platform
from cllm.bench.matrix_results import read_records, read_results, write_record, write_results
from cllm.bench.methods import LookaheadMethod, TransformersMethod
from cllm.bench.result import SCHEMA_VERSION, EngineFacts
from cllm.errors import InputError
from tests.bench.records import AR, BLOCK, VLLM, failed_record, make_cell, make_record, make_result

MATRIX = get_matrix("demo")


def test_records_come_back(tmp_path: Path):
    records = [make_record(), failed_record(make_cell(BLOCK), "out of memory")]
    for record in records:
        write_record(tmp_path, record)
    assert read_records(tmp_path) == {record.key: record for record in records}
    assert read_records(tmp_path / "nowhere") == {}


def test_document_and_table_agree(tmp_path: Path):
    write_record(tmp_path, make_record())
    write_record(tmp_path, failed_record(make_cell(BLOCK), "out of memory"))
    obstacle = Obstacle(run="demo", method="vllm ar", why="vLLM is not installed")
    written = write_results(tmp_path, MATRIX, [obstacle])
    assert read_results([tmp_path]) == written
    rows = {row["status"]: row for row in pq.read_table(tmp_path / "results.parquet").to_pylist()}
    assert rows["done"]["accuracy"] == 0.5
    assert rows["done"]["tokens_per_s"] == 100
    assert rows["done"]["tokens_per_s_repeats"] == [90, 100, 120]
    assert rows["done"]["latency_p90_ms"] == 20
    assert rows["done"]["command"] == "jobs/benchmark.py --matrix demo"
    assert rows["done"]["energy_j"] is None
    assert (rows["done"]["trained_parameters"], rows["done"]["perplexity"]) == (None, [])
    assert (rows["failed"]["error"], rows["failed"]["accuracy"]) == ("out of memory", None)


def test_what_only_some_cells_have_is_in_the_table(tmp_path: Path):
    result = make_result(
        energy_j=(0.5, 0.7, 0.6), scores=(), trained_parameters=7, perplexity={"ptb": 9.5}, metric="judge's score"
    )
    write_record(tmp_path, make_record(result=result))
    write_results(tmp_path, MATRIX, [])
    (row,) = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert (row["energy_j"], row["trained_parameters"], row["perplexity"]) == (0.6, 7, [("ptb", 9.5)])
    assert row["accuracy"] is None


def test_rows_of_the_table_say_what_was_asked_of_whom(tmp_path: Path):
    """Without the document: load, test set, versions, and what served."""
    load = LoadConfig(num_prompts=9, speed_prompts=5, max_new_tokens=8, temperature=0.5, top_p=0.9)
    engine = EngineFacts(
        package="vllm", version="0.29", runner="V2", scheduling="async", guesses=3,
        steps=2, proposed=6, accepted=3, accepted_at=(2, 1, 0),
    )  # fmt: skip
    result = make_result(
        engine=engine, step_ms=1.5, memory_gib=2.0, device_memory_gib=70.0, fast_forwarded=1.5, stationary=0.5,
        reference_perplexity=3.0, word_perplexity={"ptb": 20.0},
    )  # fmt: skip
    write_record(tmp_path, make_record(make_cell(VLLM, test="synthetic_sql", load=load, scorer="s"), result))
    write_results(tmp_path, MATRIX, [])
    (row,) = pq.read_table(tmp_path / "results.parquet").to_pylist()
    expected = {
        "test": "synthetic_sql", "num_prompts": 9, "speed_prompts": 5, "repeats": 3, "temperature": 0.5, "top_p": 0.9,
        "threads": 2, "versions": [("torch", "2.13")], "attempts": 1, "scorer": "s", "scores": [1, 1, 0, 0],
        "fast_forwarded": 1.5, "stationary": 0.5, "reference_perplexity": 3.0, "word_perplexity": [("ptb", 20.0)],
        "step_ms": 1.5, "memory_gib": 2.0, "device_memory_gib": 70.0, "package": "vllm", "package_version": "0.29",
        "runner": "V2", "scheduling": "async", "guesses": 3, "guesses_proposed": 6, "guesses_accepted": 3,
        "guesses_accepted_at": [2, 1, 0], "precision": "auto", "dirty": False,
    }  # fmt: skip
    assert {name: row[name] for name in expected} == expected


@pytest.mark.parametrize("name", ["scores", "response_tokens", "categories", "responses"])
def test_figures_of_another_number_of_prompts_are_refused(name: str):
    with pytest.raises(ValueError, match=f"{name}: 1 entries for 4 prompts"):
        make_result(**{name: (1,) if name in ("scores", "response_tokens") else ("x",)})


def test_folders_of_two_machines_are_one(tmp_path: Path):
    other = Platform(device="gpu", threads=0, versions={})
    here, there, both = make_record(), make_record(make_cell(platform=other)), make_cell(BLOCK)
    for folder, records in {
        "a": [here, failed_record(both, "lost")],
        "b": [there, make_record(both), here],
    }.items():
        for record in records:
            write_record(tmp_path / folder, record)
        write_results(tmp_path / folder, MATRIX, [Obstacle(run="demo", why="none")])
    merged = read_results([tmp_path / "a", tmp_path / "b"])
    assert {record.key: record.status for record in merged.records} == dict.fromkeys(
        (here.key, there.key, both.key), "done"
    )
    assert len(merged.cannot_run) == 1


@pytest.mark.parametrize(
    ("version", "way"),
    [
        (SCHEMA_VERSION + 1, "update this code"),
        (SCHEMA_VERSION - 1, "convert the folder: python -m cllm.bench.convert"),
        (None, "convert the folder"),
    ],
)
def test_another_schema_is_refused_with_the_way_out(tmp_path: Path, version: int | None, way: str):
    write_record(tmp_path, make_record())
    (path,) = (tmp_path / "cells").iterdir()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": version, "unknown": 1}))
    with pytest.raises(
        InputError, match=f"schema version {version}, this code reads {SCHEMA_VERSION}; .*{way}"
    ) as error:
        read_records(tmp_path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_damaged_files_are_named(tmp_path: Path):
    write_record(tmp_path, make_record())
    (path,) = (tmp_path / "cells").iterdir()
    whole = path.read_text()
    path.write_text(whole[:100])
    with pytest.raises(InputError, match="not a readable JSON file"):
        read_records(tmp_path)
    path.write_text(whole.replace('"concurrency": 1', '"concurrency": 2'))
    with pytest.raises(InputError, match="the cell inside has the key"):
        read_records(tmp_path)
    path.write_text(whole.replace('"attempts": 1', '"attempts": "many"'))
    with pytest.raises(InputError, match="attempts"):
        read_records(tmp_path)
    with pytest.raises(InputError, match=r"results.json: no such file; run jobs/benchmark.py"):
        read_results([tmp_path / "empty"])


def test_ratio_of_speeds_carries_both_spreads():
    ratio = speed_ratio((180.0, 200.0, 220.0), (80.0, 100.0, 110.0))
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2.0, 180 / 110, 220 / 80))
    assert not ratio.within_noise
    assert speed_ratio((95.0, 105.0, 110.0), (100.0, 101.0, 99.0)).within_noise
    assert not Ratio(1, 1, 1).within_noise  # a baseline beside itself


def test_rows_are_compared_with_the_right_cells():
    records = [
        make_record(make_cell(AR), make_result((90.0, 100.0, 120.0))),
        make_record(make_cell(BLOCK), make_result((200.0, 250.0, 300.0), response_digests=("1", "2", "3", "x"))),
        make_record(make_cell(TransformersMethod()), make_result((50.0, 50.0, 50.0))),
        make_record(make_cell(LookaheadMethod()), make_result((130.0, 150.0, 160.0))),
        make_record(make_cell(VLLM), make_result((400.0, 500.0, 600.0))),
        make_record(make_cell(VLLM.model_copy(update={"method": "ngram"})), make_result((800.0, 1000.0, 1200.0))),
        make_record(make_cell(AR, concurrency=4), make_result((1.0, 1.0, 1.0))),
        make_record(make_cell(AR, model="cllm"), make_result((7.0, 7.0, 7.0), scores=(1.0, 1.0, 1.0, 1.0))),
    ]
    rows = {(row.cell.model, row.cell.concurrency, row.cell.method.label): row for row in compare(records)}
    ar, block = rows["teacher", 1, "ar"], rows["teacher", 1, BLOCK.label]
    assert (ar.speedup, ar.minus_teacher) == (Ratio(1, 1, 1), None)
    assert block.speedup is not None
    assert block.speedup.value == 2.5
    assert block.over_vllm is not None
    assert block.over_vllm.value == 0.5
    assert block.over_transformers is not None
    assert block.over_transformers.value == 5
    assert block.identical == 0.75
    lookahead, ngram = rows["teacher", 1, LookaheadMethod().label], rows["teacher", 1, "vllm ngram k=5"]
    assert lookahead.speedup is not None
    assert lookahead.speedup.value == 1.5
    assert ngram.speedup is not None
    assert ngram.speedup.value == 2
    assert rows["teacher", 4, "ar"].over_vllm is None
    cllm = rows["cllm", 1, "ar"]
    assert cllm.speedup == Ratio(1, 1, 1)
    assert cllm.minus_teacher is not None
    assert cllm.minus_teacher.mean == 0.5
    assert not cllm.differs_from_teacher  # two of four prompts prove nothing
    assert ar.floor_share == pytest.approx(100 * 0.002)
    assert rows["teacher", 4, "ar"].floor_share == pytest.approx(1 * 0.002 / 4)


def test_rows_have_a_fixed_order():
    records = [make_record(make_cell(method, model=m)) for m in ("cllm", "teacher") for method in (VLLM, BLOCK, AR)]
    order = [(row.cell.model, row.cell.method.kind) for row in compare(records)]
    assert order == [(model, kind) for model in ("teacher", "cllm") for kind in ("ar", "jacobi", "vllm")]
