"""What is left of a request in the log: one line, which names what happened behind the status as well."""

import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

import httpx
import pytest

from serving.errors import OverloadedError, ReplicaLostError
from serving.messages import Chunk, GenerateRequest
from serving.replica import Replica
from tests.serving.running import MODEL_NAME, Server, local_app, serving_on_a_port, wait_until

BODY = {"model": MODEL_NAME, "prompt": "How many", "max_tokens": 20, "temperature": 0}


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def request(self, number: int = 0) -> dict[str, Any]:
        """What the log's line of a request says to programs; it comes behind the end of the response."""
        wait_until(lambda: len(self._requests()) > number)
        return self._requests()[number]

    def _requests(self) -> list[dict[str, Any]]:
        return [record.request for record in self.records if hasattr(record, "request")]


@pytest.fixture
def log() -> Iterator[Kept]:
    logger, kept = logging.getLogger("ray.serve"), Kept()
    level = logger.level
    logger.addHandler(kept)
    logger.setLevel(logging.INFO)
    yield kept
    logger.setLevel(level)
    logger.removeHandler(kept)


def test_a_line_a_request_for_readers_and_for_programs(server: Server, log: Kept) -> None:
    headers = {"x-request-id": "abc-1"}
    answer = httpx.post(f"{server.url}/v1/completions", json=BODY | {"user": "u" * 50_000}, headers=headers).json()
    told = log.request()
    assert (told["id"], told["path"], told["status"], told["model"]) == ("abc-1", "/v1/completions", 200, MODEL_NAME)
    assert told["completion_tokens"] == answer["usage"]["completion_tokens"]
    assert 0 < len(told["user"]) < 100
    assert "error" not in told
    line = log.records[-1].getMessage()
    assert len(line) < 500
    assert all(word in line for word in ('id="abc-1"', "status=200", f'model="{MODEL_NAME}"'))
    assert "How many" not in line
    assert answer["choices"][0]["text"] not in line


@pytest.mark.parametrize("error", [OverloadedError("full"), ReplicaLostError("lost"), ZeroDivisionError()], ids=repr)
def test_an_error_behind_the_first_chunk_is_in_the_log(replica: Replica, log: Kept, error: Exception) -> None:
    class Failing:
        async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
            async with aclosing(replica.generate(request)) as chunks:
                yield await anext(chunks)
                raise error

    with serving_on_a_port(local_app({MODEL_NAME: Failing()})) as server:
        answer = httpx.post(f"{server.url}/v1/completions", json=BODY | {"stream": True})
        assert '"error"' in answer.text
        assert "[DONE]" not in answer.text
        told = log.request()
    assert told["status"] == 200
    assert told["error"] == ("server_error" if isinstance(error, ZeroDivisionError) else "overloaded")
