"""The load test: its arithmetic, and both loops against a server."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse

from cllm.errors import InputError
from cllm.report.served import LoadDocument, Spread, read_served
from serving.load_test import Answer, Load, arrival_times, main, read_prompts, report, run_load, spread
from serving.replica import Replica
from tests.serving.running import MODEL_NAME, Server, local_app, serving_on_a_port


def test_arrivals_are_poisson() -> None:
    times = arrival_times(5.0, 20_000, seed=1)
    gaps = [later - earlier for earlier, later in zip([0.0, *times], times, strict=False)]
    mean = sum(gaps) / len(gaps)
    assert times == sorted(times) == arrival_times(5.0, 20_000, seed=1)
    assert mean == pytest.approx(0.2, rel=0.03)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(0.04, rel=0.08)  # variance = mean²


def test_percentiles_are_values_that_occurred() -> None:
    assert spread([]) is None
    found = spread([float(i) for i in range(100, 0, -1)])
    assert found == Spread(mean=50.5, p50=50.0, p90=90.0, p95=95.0, p99=99.0, max=100.0)


def test_the_reports_arithmetic() -> None:
    load = Load("http://x", "m", 3, 8, concurrency=1)
    answers = [
        Answer(1.0, [1.5, 2.0, 3.5], num_tokens=5),
        Answer(2.0, [2.25], num_tokens=1),
        Answer(2.0, error="HTTP 503", retry_after=True),
    ]
    found = report(load, answers, 4.0, {})
    assert (found.num_requests, found.num_answered, found.tokens_per_s) == (3, 2, 1.5)
    assert (found.errors, found.refused_with_retry_after) == ({"HTTP 503": 1}, 1)
    spreads = (found.first_token_s, found.per_token_s, found.between_chunks_s, found.request_s)
    assert [one.max for one in spreads if one is not None] == [0.5, 0.5, 1.5, 2.5]


@pytest.mark.parametrize("loop", [{"concurrency": 3}, {"rate": 200.0}, {"concurrency": 3, "chat": True}])
def test_both_loops_ask_everything_once(server: Server, loop: dict[str, Any]) -> None:
    load = Load(server.url, MODEL_NAME, 9, 6, **loop)
    answers, seconds = asyncio.run(run_load(load, ["How many", "SELECT"]))
    found = report(load, answers, seconds, {})
    assert found.errors == {}
    assert found.num_answered == 9
    assert all(1 <= answer.num_tokens <= 6 and answer.asked_at <= answer.chunks_at[0] for answer in answers)


def test_a_path_before_v1_is_kept(replica: Replica) -> None:
    outer = FastAPI()
    outer.mount("/base", local_app({MODEL_NAME: replica}))
    with serving_on_a_port(outer) as server:
        for url, errors in ((f"{server.url}/base", {}), (f"{server.url}/base/", {}), (server.url, {"HTTP 404": 2})):
            load = Load(url, MODEL_NAME, 2, 6, concurrency=1)
            answers, seconds = asyncio.run(run_load(load, ["How many"]))
            assert report(load, answers, seconds, {}).errors == errors


@pytest.mark.parametrize(("usage", "errors"), [(None, {"no count of tokens in the stream": 2}), (7, {})])
def test_chunks_are_no_count_of_tokens(usage: int | None, errors: dict[str, int]) -> None:
    """Of a server that knows no stream_options there is no speed; one that tells the usage early is understood."""
    app = FastAPI()

    @app.post("/v1/completions")
    async def complete() -> PlainTextResponse:
        told = {} if usage is None else {"usage": {"completion_tokens": usage}}
        events = [{"choices": [{"text": "a"}]}, {"choices": [{"text": "b"}]} | told]
        lines = [f"data: {json.dumps(event)}\n\n" for event in events]
        return PlainTextResponse("".join([*lines, "data: [DONE]\n\n"]), media_type="text/event-stream")

    with serving_on_a_port(app) as server:
        load = Load(server.url, "m", 2, 6, concurrency=1)
        answers, seconds = asyncio.run(run_load(load, ["How many"]))
    found = report(load, answers, seconds, {})
    assert found.errors == errors
    assert found.tokens == 2 * (usage or 0)
    assert found.num_answered == (0 if errors else 2)


def test_errors_are_counted_and_the_report_is_written(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.jsonl").write_text('"How many"\n{"prompt": "SELECT"}\n')
    common = ["--url", server.url, "--prompts", str(tmp_path / "prompts.jsonl"), "--requests", "3", "--max-tokens", "4"]
    output = ["--output", str(tmp_path / "report.json")]
    assert main([*common, *output, "--model", MODEL_NAME, "--concurrency", "2"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads((tmp_path / "report.json").read_text())
    document = read_served(tmp_path / "report.json")
    assert isinstance(document, LoadDocument)
    assert (document.num_answered, document.concurrency, document.endpoint) == (3, 2, "completions")
    assert document.provenance["command"][0] == "serving/load_test.py"
    assert main([*common, "--model", "none", "--rate", "50"]) == 1
    assert json.loads(capsys.readouterr().out)["errors"] == {"HTTP 404": 3}


@pytest.mark.parametrize("text", [None, "", "{", "5", '{"text": "x"}'])
def test_bad_prompt_files(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(InputError, match="--prompts"):
        read_prompts(tmp_path / "p.jsonl")
