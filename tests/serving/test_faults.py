"""What clients and machines do wrong, at the scale of a bad day, against a real Serve application.

`test_serve.py` has the same with few clients; here are 32 streams that lose a replica, ten times the load, 500 clients
that go away, connections that never finish asking, and bodies of 100 MB.
"""

import asyncio
import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import psutil
import pytest

from tests.serving.deployed import deployed, replica_pids, samples
from tests.serving.running import MODEL_NAME, model_entry, wait_until

pytestmark = pytest.mark.ray

NAME = f"faults{os.getpid()}"
SMALL, CAPACITY = "small", 8
QUEUE = 4  # a replica that is lost leaves more requests than that
BODY_S, BODY_BYTES = 5, 1 << 20
PATIENCE_S = 240
OPTIONS = {"window": 8, "max_rows": 16, "max_tokens": 160, "block_tokens": 8}
LONG = {"prompt": "How many", "max_tokens": 140, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def url(model_folder: Path) -> Iterator[str]:
    models = {
        MODEL_NAME: model_entry(model_folder, replicas=2, max_queue=QUEUE, options=OPTIONS).model_dump(),
        SMALL: model_entry(model_folder, max_ongoing=CAPACITY // 2, max_queue=CAPACITY // 2).model_dump(),
    }
    args = {"models": models, "ingress": {"cpus": 0.1}, "limits": {"body_s": BODY_S, "body_bytes": BODY_BYTES}}
    with deployed(args, NAME) as url:
        yield url


def session(url: str) -> aiohttp.ClientSession:
    timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
    return aiohttp.ClientSession(url, timeout=timeout, connector=aiohttp.TCPConnector(limit=0))


@asynccontextmanager
async def admitted(client: aiohttp.ClientSession, body: dict[str, Any]) -> AsyncIterator[aiohttp.ClientResponse]:
    """The answer, asked for again as long as the queue is full."""
    while True:
        async with client.post("/v1/completions", json=body) as answer:
            if answer.status != 503:
                yield answer
                return
        await asyncio.sleep(0.05)


async def stream_tokens(client: aiohttp.ClientSession, prompt: str, begun: asyncio.Event) -> list[str]:
    body = {"model": MODEL_NAME, **LONG, "prompt": prompt, "temperature": 1, "seed": 3, "logprobs": 0, "stream": True}
    tokens: list[str] = []
    async with admitted(client, body) as answer:
        async for line in answer.content:
            if line.startswith(b"data: {"):
                begun.set()
                (choice,) = json.loads(line.removeprefix(b"data: "))["choices"]  # an error has none
                tokens += choice["logprobs"]["tokens"]
    return tokens


async def stream_all(url: str, prompts: Sequence[str], when_begun: Callable[[], None]) -> list[list[str]]:
    """The tokens of all prompts, streamed at the same time; the call comes when each has its first ones."""
    begun = [asyncio.Event() for _ in prompts]
    async with asyncio.timeout(PATIENCE_S), session(url) as client:
        streams = asyncio.gather(*(stream_tokens(client, p, event) for p, event in zip(prompts, begun, strict=True)))
        for event in begun:
            await event.wait()
        when_begun()
        return list(await streams)


def test_32_streams_do_not_notice_that_a_replica_is_killed(url: str) -> None:
    """The other one has 2 free places and a queue of 4 for the 16 that it takes over: the rest has to wait outside."""
    prompts = [f"How many {i}" for i in range(32)]
    expected = asyncio.run(stream_all(url, prompts, lambda: None))
    victim = replica_pids(NAME, MODEL_NAME)[0]
    assert asyncio.run(stream_all(url, prompts, lambda: os.kill(victim, signal.SIGKILL))) == expected
    assert {len(tokens) for tokens in expected} == {LONG["max_tokens"]}
    wait_until(lambda: len(replica_pids(NAME, MODEL_NAME)) == 2 and victim not in replica_pids(NAME, MODEL_NAME))


def test_at_ten_times_the_capacity_refusals_do_not_wait_and_the_rest_finishes(url: str) -> None:
    statuses: list[int] = []  # in the order of the answers
    texts: set[str] = set()

    async def ask(client: aiohttp.ClientSession) -> None:
        async with client.post("/v1/completions", json={"model": SMALL, **LONG}) as answer:
            body = await answer.json()
        statuses.append(answer.status)
        if answer.status == 200:
            texts.add(body["choices"][0]["text"])
        else:
            assert (answer.status, answer.headers["Retry-After"]) == (503, "1")

    async def run() -> None:
        async with session(url) as client:
            await asyncio.gather(*(ask(client) for _ in range(10 * CAPACITY)))

    asyncio.run(run())
    assert CAPACITY <= statuses.count(200) < 10 * CAPACITY
    assert len(texts) == 1
    # Who is refused is refused while those who came first are still being answered.
    assert statuses[: statuses.index(200)].count(503) > statuses.count(503) / 2
    assert statuses[-1] == 200


def test_500_clients_that_go_away_leave_neither_row_nor_block(url: str) -> None:
    gate = asyncio.Semaphore(30)
    of_replicas = {"application": NAME, "model": MODEL_NAME}

    async def leave(client: aiohttp.ClientSession) -> None:
        async with gate, admitted(client, {"model": MODEL_NAME, **LONG, "stream": True}) as answer:
            assert answer.status == 200
            await answer.content.readline()

    async def run() -> None:
        async with session(url) as client:
            await asyncio.gather(*(leave(client) for _ in range(500)))

    async def ask_shortly() -> None:
        """So many at a time that each replica's engine gets some, and says how it stands."""
        body = {"model": MODEL_NAME, "prompt": "How", "max_tokens": 2}

        async def ask(client: aiohttp.ClientSession) -> None:
            async with admitted(client, body) as answer:
                assert answer.status == 200

        async with session(url) as client:
            await asyncio.gather(*(ask(client) for _ in range(16)))

    def all_idle() -> bool:
        asyncio.run(ask_shortly())
        found = samples(url, **of_replicas)
        names = ("ray_cllm_batch_rows", "ray_cllm_waiting_requests", "ray_cllm_cache_used_ratio")
        return all(found.get(name) == 0 for name in names)

    asyncio.run(run())
    wait_until(
        lambda: samples(url, **of_replicas, outcome="aborted").get("ray_cllm_requests_total", 0) >= 400
    )  # a few may have finished
    wait_until(all_idle, PATIENCE_S)


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    connection.settimeout(PATIENCE_S)
    return connection


def answers_as_ever(url: str) -> bool:
    body = {"model": MODEL_NAME, **LONG, "max_tokens": 4}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200


def test_connections_that_never_finish_asking_hold_up_nobody(url: str) -> None:
    with ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(connect(url)).sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        slow = [stack.enter_context(connect(url)) for _ in range(50)]
        for connection in slow:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert answers_as_ever(url)
        assert {connection.recv(12) for connection in slow} == {b"HTTP/1.1 408"}


def memory_of_the_ingress() -> int:
    return sum(psutil.Process(pid).memory_info().rss for pid in replica_pids(NAME, "ingress"))


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "chunked"])
def test_a_body_of_100_mb_is_refused_and_not_kept(url: str, declared: bool) -> None:
    size, piece = 100_000_000, b"x" * 1_000_000
    head = f"Content-Length: {size}" if declared else "Transfer-Encoding: chunked"
    before = memory_of_the_ingress()
    with connect(url) as connection:
        connection.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n".encode())
        try:
            for _ in range(size // len(piece)):
                connection.sendall(piece if declared else b"%x\r\n%s\r\n" % (len(piece), piece))
        except OSError:
            pass  # the server has said what it thinks, and hung up
        status = connection.recv(12)
    assert status == b"HTTP/1.1 413"
    assert memory_of_the_ingress() - before < size // 2
    assert answers_as_ever(url)
