"""A real Serve application: two replicas of a model, and a small one that is easily overloaded."""

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI
from ray import serve

from cllm.errors import InputError
from serving.build import app
from serving.replica import Replica
from tests.serving.deployed import deployed, replica_pids
from tests.serving.running import MODEL_NAME, model_entry, wait_until

pytestmark = pytest.mark.ray

APP_NAME = f"app{os.getpid()}"
SMALL = "small"
LONG = {"max_tokens": 150, "extra_body": {"ignore_eos": True}}


@dataclass(frozen=True)
class Running:
    url: str
    args: dict[str, Any]

    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def running(model_folder: Path) -> Iterator[Running]:
    """The application on a Ray of its own."""
    tiny = model_entry(model_folder, replicas=2).model_dump()
    small = model_entry(model_folder, max_queue=2, max_ongoing=2).model_dump()
    args = {"models": {MODEL_NAME: tiny, SMALL: small}, "ingress": {"cpus": 0.1}}
    with deployed(args, APP_NAME) as url:
        yield Running(url, args)


def replicas() -> list[int]:
    return replica_pids(APP_NAME, MODEL_NAME)


def num_unfinished(model: str) -> int:
    async def ask() -> list[int]:  # with RAY_SERVE_THROUGHPUT_OPTIMIZED handles work inside an event loop only
        handle: Any = serve.get_deployment_handle(model, APP_NAME)
        found: list[int] = await handle.broadcast("num_unfinished").results_async()
        return found

    return sum(asyncio.run(ask()))


def alone(replica: Replica, server_url: str, prompt: str, **options: Any) -> str:
    client = OpenAI(base_url=f"{server_url}/v1", api_key="none")
    return client.completions.create(model=MODEL_NAME, prompt=prompt, **options).choices[0].text


def test_streams_equal_whole_responses_and_those_without_serve(running: Running, server: Any, replica: Replica) -> None:
    for options in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 11}):
        asked = {"model": MODEL_NAME, "prompt": "How many", "max_tokens": 60, **options}
        whole = running.client().completions.create(**asked)
        chunks = list(running.client().completions.create(**asked, stream=True, extra_body={"decoding": True}))
        expected = alone(replica, server.url, "How many", max_tokens=60, **options)
        assert whole.choices[0].text == "".join(chunk.choices[0].text for chunk in chunks) == expected
        assert [chunk.choices[0].accepted for chunk in chunks] == chunks[-1].choices[0].decoding["accepted"]


def test_refusals_come_through(running: Running) -> None:
    def post(**fields: Any) -> httpx.Response:
        return httpx.post(f"{running.url}/v1/completions", json={"model": MODEL_NAME, "prompt": "x"} | fields)

    too_long = post(max_tokens=1000)
    assert too_long.status_code == 400
    assert "the engine's max_tokens is" in too_long.json()["error"]["message"]
    assert post(model="gpt").status_code == 404
    assert post(tools=[1]).json()["error"]["code"] == "unsupported_parameter"
    answer = httpx.post(f"{running.url}/v1/completions", content=b"x" * (2 << 20))
    assert answer.status_code == 413


def test_more_gpus_than_the_cluster_has_are_refused_at_once(running: Running) -> None:
    models = {MODEL_NAME: running.args["models"][MODEL_NAME] | {"gpus": 1}}
    with pytest.raises(InputError, match=r"need 2 GPUs \(tiny 1 x 2\), the cluster has 0"):
        app(running.args | {"models": models})


def test_a_request_id_comes_back_once(running: Running) -> None:
    answer = httpx.get(f"{running.url}/v1/models", headers={"x-request-id": "abc-1"})
    assert answer.headers.get_list("x-request-id") == ["abc-1"]


def test_a_replica_killed_under_streams_is_not_noticed(running: Running, server: Any, replica: Replica) -> None:
    prompts = [f"How many {i}" for i in range(16)]
    options: dict[str, Any] = {"temperature": 1.0, "seed": 5, **LONG}
    expected = [alone(replica, server.url, prompt, **options) for prompt in prompts]
    started = threading.Barrier(len(prompts) + 1, timeout=60)

    def stream(prompt: str) -> str:
        chunks = running.client().completions.create(model=MODEL_NAME, prompt=prompt, stream=True, **options)
        text = next(iter(chunks)).choices[0].text
        started.wait()
        return text + "".join(chunk.choices[0].text for chunk in chunks)

    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = [pool.submit(stream, prompt) for prompt in prompts]
        started.wait()
        victim = replicas()[0]
        os.kill(victim, signal.SIGKILL)
        assert [answer.result() for answer in answers] == expected
    wait_until(lambda: len(replicas()) == 2 and victim not in replicas())


def test_overload_is_refused_at_once_and_the_rest_finishes(running: Running) -> None:
    body = {"model": SMALL, "prompt": "How many", "max_tokens": 150, "ignore_eos": True, "temperature": 0}

    def ask(_: int) -> httpx.Response:
        return httpx.post(f"{running.url}/v1/completions", json=body, timeout=120)

    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(ask, range(40)))
    accepted = [answer for answer in answers if answer.status_code == 200]
    refused = [answer for answer in answers if answer.status_code != 200]
    assert len(accepted) >= 4
    assert len({answer.json()["choices"][0]["text"] for answer in accepted}) == 1
    assert refused
    for answer in refused:
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["code"] == "overloaded"


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_go_away_leave_no_row(running: Running, stream: bool) -> None:
    body = {"model": MODEL_NAME, "prompt": "How many", "max_tokens": 150, "ignore_eos": True, "stream": stream}

    def leave(_: int) -> None:
        timeout = httpx.Timeout(30, read=30 if stream else 0.05)
        try:
            with httpx.stream("POST", f"{running.url}/v1/completions", json=body, timeout=timeout) as answer:
                next(answer.iter_lines())
        except httpx.ReadTimeout:
            pass

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(leave, range(64)))
    wait_until(lambda: num_unfinished(MODEL_NAME) == 0)


def test_metrics_of_the_replicas(running: Running) -> None:
    def shown(name: str) -> Callable[[], bool]:
        return lambda: name in httpx.get(f"{running.url}/metrics").text

    for name in ("ray_cllm_first_token_seconds", "ray_cllm_accepted_tokens", "ray_cllm_requests_total"):
        wait_until(shown(name))


def test_a_rolling_update_ends_no_stream(running: Running) -> None:
    """With one attempt nothing is replayed, so a stream goes on only if its replica drains before it is replaced."""
    stop = threading.Event()
    asked: dict[str, Any] = {"model": MODEL_NAME, "prompt": "How many", "temperature": 0, "stream": True, **LONG}

    def stream() -> str:
        return "".join(chunk.choices[0].text for chunk in running.client().completions.create(**asked))

    def ask() -> set[str]:
        texts = set()
        while not stop.is_set():
            texts.add(stream())
        return texts

    args = running.args | {"ingress": running.args["ingress"] | {"attempts": 1}}
    serve.run(app(args), name=APP_NAME, route_prefix="/")
    expected, before = stream(), replicas()
    models = args["models"] | {MODEL_NAME: args["models"][MODEL_NAME] | {"stall_s": 61.0}}
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(ask) for _ in range(4)]
        serve.run(app(args | {"models": models}), name=APP_NAME, route_prefix="/")
        wait_until(lambda: not set(before) & set(replicas()))
        stop.set()
        assert set.union(*(answer.result() for answer in answers)) == {expected}
