"""Small parts: the watchdog, per-key limits, merged streams, routing keys, the metrics page, a replica's end."""

import asyncio
import gc
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from cllm.engine.async_engine import EngineStoppedError
from cllm.errors import InputError
from serving.backend import prefix_key
from serving.build import ServedReplica
from serving.config import Keys
from serving.errors import ApiError
from serving.keys import Caller
from serving.merging import merge
from serving.messages import Chat
from serving.metrics_page import merge_pages
from serving.watchdog import Watchdog
from tests.serving.running import model_entry


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_watchdog_notices_steps_that_stand_still() -> None:
    clock = Clock()
    dog = Watchdog(10, clock)
    assert not dog.is_stuck(5, 0)
    clock.now = 100  # idle for long, then a request came just now
    assert not dog.is_stuck(5, 0)
    clock.now = 109
    assert not dog.is_stuck(5, 1)
    clock.now = 111
    assert dog.is_stuck(5, 1)
    assert not dog.is_stuck(6, 1)
    clock.now = 122
    assert dog.is_stuck(6, 1)
    assert not dog.is_stuck(6, 0)


def test_a_key_has_so_many_requests_at_a_time_and_a_minute() -> None:
    clock = Clock()
    caller = Caller("ann", Keys(concurrent=2, requests_per_minute=6), clock)
    with caller.admitted(), caller.admitted(), pytest.raises(ApiError, match="at a time"), caller.admitted():
        pass
    for _ in range(4):
        with caller.admitted():
            pass
    with pytest.raises(ApiError, match="a minute") as error, caller.admitted():
        pass
    assert error.value.retry_after_s == 10
    clock.now = 10
    with caller.admitted():
        pass


def test_merged_streams_end_together() -> None:
    closed: list[str] = []

    async def endless(name: str) -> AsyncGenerator[str, None]:
        try:
            while True:
                yield name
                await asyncio.sleep(0)
        finally:
            closed.append(name)

    async def failing() -> AsyncGenerator[str, None]:
        yield "c"
        await asyncio.sleep(0)
        raise ValueError("no more")

    async def run() -> set[tuple[int, str]]:
        seen = set()
        try:
            async for item in merge([endless("a"), endless("b"), failing()]):
                seen.add(item)
        except ValueError:
            return seen
        raise AssertionError("the error was lost")

    assert asyncio.run(run()) == {(0, "a"), (1, "b"), (2, "c")}
    assert sorted(closed) == ["a", "b"]


def test_prompts_that_begin_alike_have_one_key() -> None:
    long = "the same long beginning " * 40
    assert prefix_key(long + "one") == prefix_key(long + "two") != prefix_key("another")
    tokens = tuple(range(200))
    assert prefix_key((*tokens, 1)) == prefix_key((*tokens, 2)) != prefix_key(tokens[1:])
    system = ("system", long)
    assert prefix_key(Chat((system, ("user", "a")))) == prefix_key(Chat((system, ("user", "b"))))


PAGE = """# HELP ray_cllm_batch_rows Rows
# TYPE ray_cllm_batch_rows gauge
ray_cllm_batch_rows{replica="%s"} 3.0
# HELP ray_other x
# TYPE ray_other gauge
ray_other 1.0
"""


def test_pages_of_several_nodes_become_one() -> None:
    merged = merge_pages([PAGE % "a", PAGE % "b", ""])
    assert merged.count("# TYPE") == 1
    assert 'ray_cllm_batch_rows{replica="a"} 3.0' in merged
    assert 'ray_cllm_batch_rows{replica="b"} 3.0' in merged
    assert "ray_other" not in merged


def test_serve_ends_the_engine_of_a_replica(model_folder: Path) -> None:
    replica = ServedReplica("ends", model_entry(model_folder))
    replica.check_health()
    replica.__del__()  # as Serve does, once nothing is left to answer
    with pytest.raises(EngineStoppedError, match="closed"):
        replica.check_health()


def test_a_replica_that_could_not_start_has_nothing_to_end(tmp_path: Path) -> None:
    unraisable: list[object] = []
    hook, sys.unraisablehook = sys.unraisablehook, unraisable.append
    try:
        with pytest.raises(InputError):
            ServedReplica("none", model_entry(tmp_path))
        gc.collect()
    finally:
        sys.unraisablehook = hook
    assert unraisable == []
