"""The load test: its arithmetic, and both loops against a server."""

import asyncio
import json
from pathlib import Path

import pytest

from cllm.errors import InputError
from serving.load_test import Answer, Load, arrival_times, main, read_prompts, report, run_load, summary
from tests.serving.running import MODEL_NAME, Server


def test_arrivals_are_poisson() -> None:
    times = arrival_times(5.0, 20_000, seed=1)
    gaps = [later - earlier for earlier, later in zip([0.0, *times], times, strict=False)]
    mean = sum(gaps) / len(gaps)
    assert times == sorted(times) == arrival_times(5.0, 20_000, seed=1)
    assert mean == pytest.approx(0.2, rel=0.03)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(0.04, rel=0.08)  # variance = mean²


def test_percentiles_are_values_that_occurred() -> None:
    assert summary([]) is None
    assert summary([float(i) for i in range(100, 0, -1)]) == {
        "mean": 50.5, "p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "max": 100.0,
    }  # fmt: skip


def test_the_reports_arithmetic() -> None:
    load = Load("http://x", "m", 3, 8, concurrency=1)
    answers = [
        Answer(1.0, [1.5, 2.0, 3.5], num_tokens=5),
        Answer(2.0, [2.25], num_tokens=1),
        Answer(2.0, error="HTTP 503", retry_after=True),
    ]
    found = report(load, answers, 4.0, {})
    assert (found["num_requests"], found["num_answered"], found["tokens_per_s"]) == (3, 2, 1.5)
    assert (found["errors"], found["refused_with_retry_after"]) == ({"HTTP 503": 1}, 1)
    assert found["first_token_s"]["max"] == 0.5
    assert found["per_token_s"]["mean"] == 0.5
    assert found["between_chunks_s"]["max"] == 1.5
    assert found["request_s"]["max"] == 2.5


@pytest.mark.parametrize("loop", [{"concurrency": 3}, {"rate": 200.0}])
def test_both_loops_ask_everything_once(server: Server, loop: dict[str, float]) -> None:
    load = Load(server.url, MODEL_NAME, 9, 6, **loop)  # type: ignore[arg-type]
    answers, seconds = asyncio.run(run_load(load, ["How many", "SELECT"]))
    found = report(load, answers, seconds, {})
    assert found["errors"] == {}
    assert found["num_answered"] == 9
    assert all(1 <= answer.num_tokens <= 6 and answer.asked_at <= answer.chunks_at[0] for answer in answers)


def test_errors_are_counted_and_the_report_is_written(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.jsonl").write_text('"How many"\n{"prompt": "SELECT"}\n')
    common = ["--url", server.url, "--prompts", str(tmp_path / "prompts.jsonl"), "--requests", "3", "--max-tokens", "4"]
    output = ["--output", str(tmp_path / "report.json")]
    assert main([*common, *output, "--model", MODEL_NAME, "--concurrency", "2"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads((tmp_path / "report.json").read_text())
    assert main([*common, "--model", "none", "--rate", "50"]) == 1
    assert json.loads(capsys.readouterr().out)["errors"] == {"HTTP 404": 3}


@pytest.mark.parametrize("text", [None, "", "{", "5", '{"text": "x"}'])
def test_bad_prompt_files(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(InputError, match="--prompts"):
        read_prompts(tmp_path / "p.jsonl")
