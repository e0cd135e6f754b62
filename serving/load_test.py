"""Load on any OpenAI-compatible endpoint, and what its clients saw.

    python serving/load_test.py --url http://127.0.0.1:8000 --model jacobi --prompts prompts.jsonl --concurrency 32
    python serving/load_test.py ... --rate 4      # requests a second, at random (Poisson) times
    python serving/load_test.py ... --chat        # each prompt as a user's message, to /v1/chat/completions

Closed loop: so many clients, each asks again when it has its answer. Open loop: requests come at their times however
long the answers take, as users do. A line of the prompts' file is a JSON string, or an object with `prompt`. The report
is one JSON document, on the last line of standard output or in --output.
"""

import argparse
import asyncio
import json
import math
import os
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice, pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import aiohttp

from cllm.artifacts import write_atomic
from cllm.errors import InputError
from cllm.provenance import collect_provenance
from cllm.report.served import LoadDocument, Spread

_PERCENTILES = (50, 90, 95, 99)
Asked = TypeVar("Asked")


@dataclass(frozen=True, slots=True)
class Load:
    """What to ask and how: exactly one of `concurrency` and `rate` (requests a second).

    Attributes:
        url: what stands in front of /v1.
        chat: ask /v1/chat/completions.
        ignore_eos: every answer has `max_tokens` tokens; not all servers know it.
    """

    url: str
    model: str
    num_requests: int
    max_tokens: int
    concurrency: int | None = None
    rate: float | None = None
    seed: int = 0
    temperature: float = 0.0
    timeout_s: float = 600.0
    key: str | None = None
    chat: bool = False
    ignore_eos: bool = False

    @property
    def endpoint(self) -> str:
        return f"{self.url.rstrip('/')}/v1/{'chat/completions' if self.chat else 'completions'}"


@dataclass(slots=True)
class Answer:
    """One request: seconds since the load began, and the tokens that the server counted."""

    asked_at: float
    chunks_at: list[float] = field(default_factory=list)
    num_tokens: int = 0
    error: str | None = None
    retry_after: bool = False

    @property
    def first_token_s(self) -> float:
        return self.chunks_at[0] - self.asked_at

    @property
    def seconds(self) -> float:
        return self.chunks_at[-1] - self.asked_at

    @property
    def per_token_s(self) -> float | None:
        """Mean time from token to token behind the first chunk."""
        later = self.chunks_at[-1] - self.chunks_at[0]
        return later / (self.num_tokens - 1) if self.num_tokens > 1 else None


async def run_load(load: Load, prompts: Sequence[str]) -> tuple[list[Answer], float]:
    """All answers, and the seconds from the first request to the last token."""
    headers = {} if load.key is None else {"Authorization": f"Bearer {load.key}"}
    timeout = aiohttp.ClientTimeout(total=load.timeout_s)
    connector = aiohttp.TCPConnector(limit=0)
    asked = list(islice(cycle(prompts), load.num_requests))
    async with aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector) as session:
        start = time.perf_counter()
        ask = partial(_ask, session, load, start)
        if load.concurrency is not None:
            answers = await closed_loop(ask, asked, load.concurrency)
        else:
            assert load.rate is not None
            answers = await _open_loop(ask, asked, arrival_times(load.rate, len(asked), load.seed), start)
        return answers, time.perf_counter() - start


async def closed_loop(
    ask: Callable[[Asked], Awaitable[Answer]], requests: Sequence[Asked], concurrency: int
) -> list[Answer]:
    """All answers, in the order in which they came; so many clients each ask again when they have one."""
    waiting = iter(requests)
    answers: list[Answer] = []

    async def client() -> None:
        for request in waiting:
            answers.append(await ask(request))

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return answers


def arrival_times(rate: float, count: int, seed: int) -> list[float]:
    """Of a Poisson process, in seconds."""
    draw = random.Random(seed)
    times, now = [], 0.0
    for _ in range(count):
        now += draw.expovariate(rate)
        times.append(now)
    return times


def report(load: Load, answers: Sequence[Answer], seconds: float, provenance: dict[str, Any]) -> LoadDocument:
    """The document: totals, percentiles over the answered requests, errors by what they were."""
    answered = [answer for answer in answers if answer.error is None and answer.chunks_at]
    num_tokens = sum(answer.num_tokens for answer in answered)
    return LoadDocument(
        provenance=provenance,
        model=load.model,
        endpoint="chat" if load.chat else "completions",
        rate=load.rate,
        concurrency=load.concurrency,
        max_tokens=load.max_tokens,
        temperature=load.temperature,
        seed=load.seed,
        ignore_eos=load.ignore_eos,
        num_requests=len(answers),
        num_answered=len(answered),
        errors=Counter(answer.error for answer in answers if answer.error is not None),
        refused_with_retry_after=sum(answer.retry_after for answer in answers),
        seconds=seconds,
        tokens=num_tokens,
        tokens_per_s=num_tokens / seconds,
        requests_per_s=len(answered) / seconds,
        first_token_s=spread([answer.first_token_s for answer in answered]),
        per_token_s=spread([s for answer in answered if (s := answer.per_token_s) is not None]),
        between_chunks_s=spread([b - a for answer in answered for a, b in pairwise(answer.chunks_at)]),
        request_s=spread([answer.seconds for answer in answered]),
    )


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and percentiles (nearest rank: a value that occurred); None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    ranks = {f"p{p}": ordered[max(0, math.ceil(p / 100 * len(ordered)) - 1)] for p in _PERCENTILES}
    return Spread(mean=fmean(ordered), **ranks, max=ordered[-1])


def read_prompts(path: Path) -> list[str]:
    """One prompt a line, a JSON string or an object with `prompt`.

    Raises:
        InputError: no such file, a line of another kind, or no lines.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise InputError(f"--prompts {path}: {error.strerror}") from error
    prompts = [_prompt(line, f"--prompts {path} line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise InputError(f"--prompts {path}: no prompts")
    return prompts


def _prompt(line: str, where: str) -> str:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: no JSON: {error.msg}") from error
    prompt = found.get("prompt") if isinstance(found, dict) else found
    if not isinstance(prompt, str):
        raise InputError(f"{where}: expected a string or an object with `prompt`")
    return prompt


async def _open_loop(
    ask: Callable[[str], Awaitable[Answer]], prompts: Sequence[str], times: Sequence[float], start: float
) -> list[Answer]:
    async def at(moment: float, prompt: str) -> Answer:
        await asyncio.sleep(max(0.0, start + moment - time.perf_counter()))
        return await ask(prompt)

    return list(await asyncio.gather(*map(at, times, prompts)))


async def _ask(session: aiohttp.ClientSession, load: Load, start: float, prompt: str) -> Answer:
    asked = {"messages": [{"role": "user", "content": prompt}]} if load.chat else {"prompt": prompt}
    body = {
        "model": load.model,
        **asked,
        "max_tokens": load.max_tokens,
        "temperature": load.temperature,
        "seed": load.seed,
        "stream": True,
        "stream_options": {"include_usage": True},
    } | ({"ignore_eos": True} if load.ignore_eos else {})
    answer = Answer(time.perf_counter() - start)
    try:
        async with session.post(load.endpoint, json=body) as response:
            if response.status != 200:
                answer.error = f"HTTP {response.status}"
                answer.retry_after = "Retry-After" in response.headers
                return answer
            async for event in _events(response):
                _note(answer, event, time.perf_counter() - start)
    except (aiohttp.ClientError, TimeoutError) as error:
        answer.error = type(error).__name__
    if answer.error is None and answer.num_tokens == 0:
        answer.error = "no count of tokens in the stream"  # chunks are none
    return answer


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    async for line in response.content:
        payload = line.removeprefix(b"data: ").strip()
        if line.startswith(b"data: ") and payload != b"[DONE]":
            yield json.loads(payload)


def _note(answer: Answer, event: dict[str, Any], now: float) -> None:
    if "error" in event:
        answer.error = "error in the stream"
        return
    if event["choices"]:
        answer.chunks_at.append(now)
    if event.get("usage"):  # some servers tell it with the last choice
        answer.num_tokens = event["usage"]["completion_tokens"]


def parse_arguments(arguments: Sequence[str]) -> tuple[Load, Path, Path | None]:
    """The load, the prompts' file, the report's file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="what stands in front of /v1")
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one request")
    parser.add_argument("--key-env", default="OPENAI_API_KEY", help="environment variable with the API key")
    parser.add_argument("--chat", action="store_true", help="ask /v1/chat/completions")
    parser.add_argument("--ignore-eos", action="store_true", help="answers of --max-tokens tokens, where known")
    parser.add_argument("--output", type=Path)
    loop = parser.add_mutually_exclusive_group(required=True)
    loop.add_argument("--concurrency", type=int, help="closed loop: clients")
    loop.add_argument("--rate", type=float, help="open loop: requests a second")
    asked = parser.parse_args(arguments)
    for name in ("requests", "max_tokens", "concurrency", "rate", "timeout"):
        value = getattr(asked, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be > 0, got {value}")
    load = Load(
        url=asked.url,
        model=asked.model,
        num_requests=asked.requests,
        max_tokens=asked.max_tokens,
        concurrency=asked.concurrency,
        rate=asked.rate,
        seed=asked.seed,
        temperature=asked.temperature,
        timeout_s=asked.timeout,
        key=os.environ.get(asked.key_env) or None,
        chat=asked.chat,
        ignore_eos=asked.ignore_eos,
    )
    return load, asked.prompts, asked.output


def main(arguments: Sequence[str]) -> int:
    """The exit code: 0 if any request was answered, 1 if none, 2 for bad input."""
    load, prompts_file, output = parse_arguments(arguments)
    try:
        prompts = read_prompts(prompts_file)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    answers, seconds = asyncio.run(run_load(load, prompts))
    document = report(load, answers, seconds, collect_provenance(["serving/load_test.py", *arguments]))
    if output is not None:
        write_atomic(output, document.model_dump_json(indent=2) + "\n")
    print(document.model_dump_json())
    return 0 if document.num_answered else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
