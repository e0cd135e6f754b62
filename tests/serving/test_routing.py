"""What Serve does with our settings: where it sends prompts that begin alike, and whom its own queue refuses."""

import asyncio
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serving.deployed import deployed
from tests.serving.running import MODEL_NAME, model_entry, wait_until

pytestmark = pytest.mark.ray

NAME = f"routing{os.getpid()}"
REPLICAS, CONNECTIONS, TOKENS = 4, 8, 100  # long enough that clients meet at a replica
SYSTEM = [5] * 128  # as many tokens as prompts are told apart by
ALIKE = [[*SYSTEM, 10 + number] for number in range(24)]


@pytest.fixture(scope="module")
def url(model_folder: Path) -> Iterator[str]:
    options = {"window": 1, "max_rows": 1, "max_tokens": 250, "block_tokens": 8}
    entry = model_entry(model_folder, replicas=REPLICAS, max_ongoing=1, routing="prefix", options=options)
    args = {"models": {MODEL_NAME: entry.model_dump()}, "ingress": {"cpus": 0.1, "connections": CONNECTIONS}}
    with deployed(args, NAME) as url:
        yield url


def answered(url: str) -> Counter[str]:
    """Replica -> requests that it has finished."""
    found: Counter[str] = Counter()
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text):
        for sample in family.samples:
            if sample.name == "ray_cllm_requests_total" and sample.labels.get("application") == NAME:
                found[sample.labels["replica"]] += int(sample.value)
    return found


def ask_all(url: str, prompts: list[list[int]], clients: int) -> list[aiohttp.ClientResponse]:
    """The answers to all prompts, by so many clients at a time, whose bodies have been read."""
    gate = asyncio.Semaphore(clients)

    async def ask(session: aiohttp.ClientSession, prompt: list[int]) -> aiohttp.ClientResponse:
        body = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True}
        async with gate, session.post("/v1/completions", json=body) as answer:
            await answer.read()
        return answer

    async def run() -> list[aiohttp.ClientResponse]:
        async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0)) as session:
            return list(await asyncio.gather(*(ask(session, prompt) for prompt in prompts)))

    return asyncio.run(run())


def count_of(url: str, before: Counter[str], total: int) -> Counter[str]:
    """Replica -> requests since, once metrics of so many have come."""
    wait_until(lambda: (answered(url) - before).total() == total)
    return answered(url) - before


def test_prompts_that_begin_alike_go_to_one_replica_as_long_as_it_has_room(url: str) -> None:
    before = answered(url)
    assert {answer.status for answer in ask_all(url, ALIKE[:8], clients=1)} == {200}
    assert list(count_of(url, before, 8).values()) == [8]
    before = answered(url)
    others = [[10 + number, *SYSTEM] for number in range(16)]
    assert {answer.status for answer in ask_all(url, others, clients=1)} == {200}
    assert len(count_of(url, before, 16)) > 1


def test_a_prefix_that_everybody_shares_uses_all_replicas(url: str) -> None:
    before = answered(url)
    assert {answer.status for answer in ask_all(url, ALIKE, clients=CONNECTIONS)} == {200}
    assert len(count_of(url, before, len(ALIKE))) == REPLICAS


def test_whom_serves_own_queue_refuses_may_try_again(url: str) -> None:
    answers = ask_all(url, ALIKE * 3, clients=len(ALIKE) * 3)
    statuses = Counter(answer.status for answer in answers)
    assert statuses.keys() == {200, 503}
    assert {answer.headers.get("Retry-After") for answer in answers if answer.status == 503} == {"1"}
