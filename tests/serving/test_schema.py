"""Requests generated from the OpenAPI schema, right and wrong ones: never a 5xx, and answers as the schema says."""

import os
from collections import Counter

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from tests.serving.running import MODEL_NAME, Server

EXAMPLES = int(os.environ.get("SCHEMA_EXAMPLES", "500"))  # of each operation and mode; there are four with a body
OPERATIONS = [("/v1/completions", "POST"), ("/v1/chat/completions", "POST"), ("/v1/models", "GET")]
PATIENCE_S = 30  # for an answer; more is a hang


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_generated_requests(server: Server, path: str, method: str, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    cases = schema[path][method].as_strategy(generation_mode=mode)
    count = EXAMPLES if method == "POST" else EXAMPLES // 20  # nothing varies where there is no body
    statuses: Counter[int] = Counter()

    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(cases, st.sampled_from([True, True, True, False]))
    def check(case: schemathesis.Case, names_the_model: bool) -> None:
        if names_the_model and isinstance(case.body, dict):  # a generated name never reaches a model
            case.body = case.body | {"model": MODEL_NAME}
        checks = [not_a_server_error, status_code_conformance, response_schema_conformance]
        statuses[case.call_and_validate(checks=checks, timeout=PATIENCE_S).status_code] += 1

    check()
    assert statuses.total() >= count
    assert statuses[200] > count // 100  # some get as far as the engine
