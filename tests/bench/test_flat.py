"""The table's rows as plain JSON: the keys that are promised, and figures by hand."""

import json
from pathlib import Path

import pytest

from cllm.bench.compare import compare
from cllm.bench.engines import Row as EngineRow
from cllm.bench.flat import ROWS_NAME, flat_document, write_rows
from cllm.bench.methods import JacobiMethod, LookaheadMethod, TransformersMethod, VllmMethod
from cllm.bench.result import EngineFacts
from tests.bench.records import AR, PROVENANCE, VLLM, make_cell, make_record, make_result

MORE = {"method", "accuracy", "speedup_over_vllm_ar", "trained_parameters"}
INSIDE = EngineFacts(
    package="vllm", version="0.29", runner="V2", scheduling="async", guesses=15, proposed=30, accepted=12
)


def test_keys_and_figures(tmp_path: Path) -> None:
    jacobi = VllmMethod(method="jacobi", guesses=15)
    fast = make_result((300.0, 330.0, 360.0), step_ms=3.0, memory_gib=0.5, trained_parameters=7, engine=INSIDE, tpf=3.0)
    elsewhere = {**PROVENANCE, "commit": "fedcba"}
    records = [
        make_record(make_cell(VLLM)),
        make_record(make_cell(jacobi, model="cllm"), fast, provenance=elsewhere),
        make_record(make_cell(VLLM, model="cllm"), provenance=elsewhere),
    ]
    write_rows(tmp_path, compare(records))
    document = json.loads((tmp_path / ROWS_NAME).read_text())
    rows = {(row["model"], row["method"]): row for row in document["rows"]}
    row = rows["cllm", jacobi.label]
    assert row.keys() >= set(EngineRow.__annotations__) | MORE
    assert (row["engine"], row["decoder"], row["n"], row["concurrency"]) == ("vllm", "jacobi", 16, 1)
    assert (row["tokens_per_s"], row["speedup_over_vllm_ar"]) == (330, pytest.approx(3.3))
    assert (row["step_ms"], row["floor_ratio"], row["tpf"], row["memory_gib"]) == (3.0, 1.5, 3.0, 0.5)
    assert (row["accuracy"], row["trained_parameters"]) == (0.5, 7)
    assert (row["runner"], row["scheduling"], row["acceptance"]) == ("V2", "async", 0.4)
    assert rows["teacher", "vllm ar"]["floor_ratio"] is None
    commits = [document["sources"][rows[key]["source"]]["commit"] for key in rows]
    assert commits == [PROVENANCE["commit"], "fedcba", "fedcba"]


def test_names_and_windows_of_decoders() -> None:
    methods = {
        AR: ("ar", 1),
        JacobiMethod(window=8): ("jacobi", 8),
        JacobiMethod(window=8, refill="block"): ("jacobi-block", 8),
        JacobiMethod(window=8, policy="adaptive"): ("jacobi-adaptive", 8),
        LookaheadMethod(window=5): ("lookahead", 5),
        TransformersMethod(): ("generate", 1),
        VLLM: ("ar", 1),
        VllmMethod(method="ngram", guesses=4): ("ngram", 5),
    }
    rows = flat_document(compare([make_record(make_cell(method)) for method in methods]))["rows"]
    assert {row["method"]: (row["decoder"], row["n"]) for row in rows} == {
        method.label: named for method, named in methods.items()
    }
