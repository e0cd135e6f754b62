"""Requests generated from the OpenAPI schema, right and wrong ones: never a 5xx, and answers as the schema says.

Most of them ask a server in this process, the rest a Serve application, through its proxy.
"""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from tests.serving.deployed import deployed
from tests.serving.running import MODEL_NAME, Server, model_entry

EXAMPLES = int(os.environ.get("SCHEMA_EXAMPLES", "500"))  # of each operation with a body and mode, in both places
SERVE_SHARE = 5  # one of so many goes to Serve
POSTS = pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
GETS = pytest.mark.parametrize("path", ["/v1/models", "/health", "/metrics"])
MODES = pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
PATIENCE_S = 30  # for an answer; more is a hang


@pytest.fixture(scope="module")
def serve_url(model_folder: Path) -> Iterator[str]:
    args = {"models": {MODEL_NAME: model_entry(model_folder).model_dump()}, "ingress": {"cpus": 0.1}}
    with deployed(args, f"schema{os.getpid()}") as url:
        yield url


def statuses_of(url: str, path: str, method: str, mode: GenerationMode, count: int) -> Counter[int]:
    """Of so many generated requests, each of which was answered as it must be."""
    cases = schemathesis.openapi.from_url(f"{url}/openapi.json")[path][method].as_strategy(generation_mode=mode)
    statuses: Counter[int] = Counter()

    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(cases, st.sampled_from([True, True, True, False]))
    def check(case: schemathesis.Case, names_the_model: bool) -> None:
        if names_the_model and isinstance(case.body, dict):  # a generated name never reaches a model
            case.body = case.body | {"model": MODEL_NAME}
        checks = [not_a_server_error, status_code_conformance, response_schema_conformance]
        statuses[case.call_and_validate(checks=checks, timeout=PATIENCE_S).status_code] += 1

    check()
    return statuses


@MODES
@POSTS
def test_generated_requests(server: Server, path: str, mode: GenerationMode) -> None:
    count = EXAMPLES - EXAMPLES // SERVE_SHARE
    statuses = statuses_of(server.url, path, "POST", mode, count)
    assert statuses.total() >= count
    assert statuses[200] > count // 100  # some get as far as the engine


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/completions", {"prompt": "SELECT"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "SELECT"}]}),
    ],
)
def test_streams_are_as_the_schema_says(server: Server, path: str, asked: dict[str, Any]) -> None:
    """To the end; requests that are generated rarely ask for a stream."""
    operation = schemathesis.openapi.from_url(f"{server.url}/openapi.json")[path]["POST"]
    case = operation.Case(body=asked | {"model": MODEL_NAME, "stream": True, "max_tokens": 5})
    answer = case.call_and_validate(checks=[response_schema_conformance], timeout=PATIENCE_S)
    assert answer.text.endswith("data: [DONE]\n\n")


@pytest.mark.ray
@MODES
@POSTS
def test_generated_requests_to_serve(serve_url: str, path: str, mode: GenerationMode) -> None:
    count = EXAMPLES // SERVE_SHARE
    statuses = statuses_of(serve_url, path, "POST", mode, count)
    assert statuses.total() >= count
    assert statuses[200] > 0


@pytest.mark.ray
@GETS
def test_what_takes_no_body(serve_url: str, path: str) -> None:
    """Nothing varies but the headers."""
    assert statuses_of(serve_url, path, "GET", GenerationMode.POSITIVE, 5).keys() == {200}
