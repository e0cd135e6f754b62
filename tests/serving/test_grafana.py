"""The dashboard shows what is exported, all of it, and nothing else; and what is exported is true."""

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray import serve

from cllm.decoding.records import SamplingParams
from serving.dashboard import dashboard, panels
from serving.messages import GenerateRequest, Given
from tests.serving.deployed import deployed, samples
from tests.serving.running import DEFECT, MODEL_NAME, model_entry, wait_until

FILE = Path(__file__).parents[2] / "serving" / "grafana.json"
EXPRESSIONS = [expression for panel in panels() for expression, _ in panel.queries]
REQUESTS, TOKENS = 6, 20
RESUMED = 1  # tokens, so one step
NAME = f"dashboard{os.getpid()}"
OF_REPLICA = {
    "application": NAME,
    "model": MODEL_NAME,
}  # replicas of other tests live in this process, and tell as well


def base(name: str) -> str:
    """The metric that a sample or an expression's series belongs to."""
    return re.sub(r"_(bucket|sum|count|created)$", "", name)


def on_the_dashboard() -> set[str]:
    return {base(name) for expression in EXPRESSIONS for name in re.findall(r"ray_\w+", expression)}


@pytest.fixture(scope="module")
def url(model_folder: Path) -> Iterator[str]:
    """An application that has answered some requests, refused two, failed at one and resumed one."""
    args = {"models": {MODEL_NAME: model_entry(model_folder).model_dump()}, "ingress": {"cpus": 0.1}}
    with deployed(args, NAME) as url:
        body = {"model": MODEL_NAME, "prompt": "How many", "max_tokens": TOKENS, "ignore_eos": True, "temperature": 0}
        by_step = {"stream": True, "decoding": True}  # a chunk each
        for _ in range(REQUESTS):
            assert httpx.post(f"{url}/v1/completions", json=body | by_step, timeout=60).status_code == 200
        assert httpx.post(f"{url}/v1/completions", json=body | {"model": "none"}).status_code == 404
        assert httpx.post(f"{url}/v1/completions", json=body | {"max_tokens": 10_000}).status_code == 400
        defect = {"model": MODEL_NAME, "messages": [{"role": "user", "content": DEFECT}]}
        assert httpx.post(f"{url}/v1/chat/completions", json=defect).status_code == 500
        resume()
        yield url


def resume() -> None:
    """Let the replica go on with a response of which another one gave all tokens but `RESUMED`."""
    given = Given((5,) * (TOKENS - RESUMED))
    request = GenerateRequest(
        "r", "How", TOKENS, SamplingParams(ignore_eos=True), time.time() - 1000, given, delivery="steps"
    )
    handle: Any = serve.get_deployment_handle(MODEL_NAME, NAME).options(stream=True)
    assert sum(len(chunk.token_ids) for chunk in handle.generate.remote(request)) == RESUMED


def test_the_file_is_what_the_program_writes() -> None:
    assert json.loads(FILE.read_text()) == dashboard(), "python -m serving.dashboard > serving/grafana.json"


def test_panels_neither_overlap_nor_share_an_id() -> None:
    shown = dashboard()["panels"]
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in shown]
    assert len(set(places)) == len({p["id"] for p in shown}) == len({p["title"] for p in shown}) == len(shown)
    assert all(p["gridPos"]["x"] + p["gridPos"]["w"] <= 24 for p in shown)
    assert all(len({t["refId"] for t in p["targets"]}) == len(p["targets"]) for p in shown)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expressions_are_promql(expression: str) -> None:
    parser = pytest.importorskip("promql_parser", reason="promql-parser is not installed")
    parser.parse(expression.replace("$__rate_interval", "1m"))


@pytest.mark.ray
def test_the_dashboard_shows_all_that_is_exported_and_nothing_else(url: str) -> None:
    def exported() -> set[str]:
        return {base(name) for name in samples(url)}

    wait_until(lambda: exported() >= on_the_dashboard())
    assert exported() == on_the_dashboard()


@pytest.mark.ray
def test_what_is_exported_is_true(url: str) -> None:
    def all_counted() -> bool:
        found = samples(url, status_code="400") | samples(url, **OF_REPLICA)
        return found.get("ray_cllm_requests_total") == REQUESTS + 3 and "ray_serve_num_http_requests_total" in found

    wait_until(all_counted)
    found: dict[str, Any] = samples(url, **OF_REPLICA)
    tokens, responses = REQUESTS * TOKENS + RESUMED, REQUESTS + 1
    assert found["ray_cllm_tokens_total"] == tokens
    assert found["ray_cllm_accepted_tokens_sum"] == pytest.approx(tokens)  # buckets around whole numbers
    assert found["ray_cllm_tokens_per_forward_count"] == responses
    assert found["ray_cllm_first_token_seconds_count"] == REQUESTS  # the client of the resumed one had its first
    assert found["ray_cllm_queue_seconds_count"] == REQUESTS + 2  # with those that were refused or failed
    assert found["ray_cllm_queue_seconds_sum"] < 100
    steps = found["ray_cllm_accepted_tokens_count"]
    assert found["ray_cllm_inter_token_seconds_count"] == steps - responses
    mean = found["ray_cllm_tokens_per_forward_sum"] / responses  # of the middles of the buckets that hold them
    assert mean == pytest.approx(tokens / steps, rel=0.15)
    assert found["ray_cllm_step_seconds_count"] == steps - responses  # the wait for a request is no step's time
    assert found["ray_cllm_window_tokens"] == 8
    idle = ("ray_cllm_batch_rows", "ray_cllm_waiting_requests", "ray_cllm_cache_used_ratio")
    assert [found[name] for name in idle] == [0, 0, 0]
    outcomes = {"length": responses, "refused": 1, "error": 1}
    for outcome, count in outcomes.items():
        assert samples(url, **OF_REPLICA, outcome=outcome)["ray_cllm_requests_total"] == count
    for status in ("400", "404"):
        assert samples(url, status_code=status)["ray_serve_num_http_requests_total"] == 1
