"""The engine benchmark as a job: its document and its refusals."""

import json
from pathlib import Path

import pytest

from jobs.bench_engine import cases, parser, run
from jobs.cli import exit_code_of

pytestmark = pytest.mark.ray
SMALL = ["--prompt-tokens", "8", "--new-tokens", "12", "--num-prompts", "3", "--concurrency", "1", "2", "--n", "4"]


def test_a_row_for_each_case_and_a_document(
    local_ray: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "engine.json"
    asked = [*SMALL, "--decoders", "ar", "jacobi-block", "--agreement", "--no-vllm", "--out", str(out)]
    run(parser().parse_args(["--shape", "tiny", *asked]))
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document == json.loads(out.read_text())
    cases = [(row["decoder"], row["n"], row["concurrency"]) for row in document["rows"]]
    assert cases == [("ar", 1, 1), ("jacobi-block", 4, 1), ("ar", 1, 2), ("jacobi-block", 4, 2)]
    assert all(row["engine"] == "cllm" and row["tokens_per_s"] > 0 for row in document["rows"])
    assert all(row["steps_per_s"] == pytest.approx(1000 / row["step_ms"], rel=0.01) for row in document["rows"])
    assert document["floor_ms"] > 0
    assert {found["refill"]: found["identical"] for found in document["agreement_with_ar"]} == {
        "sliding": 1,
        "block": 1,
    }
    assert str(tmp_path) not in json.dumps(document["settings"])


def test_jacobi_may_be_measured_at_fewer_concurrencies() -> None:
    asked = ["--concurrency", "1", "8", "--jacobi-concurrency", "1", "--n", "4", "16"]
    found = [
        (case.decoder, case.n, case.concurrency) for case in cases(parser().parse_args(["--shape", "tiny", *asked]))
    ]
    assert found == [("ar", 1, 1), ("jacobi", 4, 1), ("jacobi", 16, 1), ("ar", 1, 8)]


def test_a_model_divided_among_two_processes(local_ray: None, capsys: pytest.CaptureFixture[str]) -> None:
    run(parser().parse_args(["--shape", "tiny", *SMALL, "--decoders", "jacobi", "--shards", "2", "--no-vllm"]))
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [(row["decoder"], row["concurrency"], row["gpus"]) for row in rows] == [("jacobi", 1, 2), ("jacobi", 2, 2)]
    assert all(row["tokens_per_s"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "tiny", "--n", "0"], "--n: at least 1 each"),
        (["--shape", "tiny", "--shards", "2", "--tune"], "--tune and --agreement: "),
        (["--shape", "tiny", "--prompts", "prompts.parquet"], "--prompts: a model with random weights"),
        (["--model", "no/such/model", *SMALL], "no/such/model: "),
    ],
)
def test_bad_input_is_one_line(
    local_ray: None, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert exit_code_of(lambda: run(parser().parse_args(arguments))) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
