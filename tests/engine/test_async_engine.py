"""The asyncio front: every stream gets its own tokens, whoever comes, goes or fails beside it."""

import asyncio
import time

import pytest

from cllm.decoding.backend import RequestFailedError
from cllm.decoding.records import Commit, DecodeRequest, SamplingParams
from cllm.decoding.reference import autoregressive
from cllm.engine.async_engine import AsyncEngine, EngineStoppedError
from cllm.engine.engine import Engine
from cllm.errors import InputError
from tests.engine.making import check_books, make_engine
from tests.fakes import EOS, PAD, tiny_model

ENDLESS = SamplingParams(ignore_eos=True)


async def collect(engine: AsyncEngine, request: DecodeRequest) -> list[int]:
    return [token async for commit in engine.stream(request) for token in commit.token_ids]


@pytest.fixture
def served():
    """A front, the engine behind it and its model."""
    model = tiny_model(4)
    inner = make_engine(model, window=4, overlap=True)
    front = AsyncEngine(lambda: inner)
    front.wait_ready(30)
    yield front, inner, model
    front.close()


def test_concurrent_streams_equal_autoregressive(served):
    front, inner, model = served
    requests = [DecodeRequest((3 + i % 9, 4), 5 + i, SamplingParams(temperature=i % 2, seed=i)) for i in range(20)]

    async def run():
        return await asyncio.gather(*(collect(front, request) for request in requests))

    assert asyncio.run(run()) == [autoregressive(model, request, [EOS]) for request in requests]
    assert front.num_unfinished == 0
    check_books(inner)


def test_bursts_hold_all_commits_of_a_pause(served):
    front, inner, model = served
    request = DecodeRequest((5, 6), 90, ENDLESS)

    async def run() -> list[list[Commit]]:
        """A pause that outlasts the response ends with it."""
        return [burst async for burst in front.bursts(request, lambda: 1000.0)]

    bursts = asyncio.run(run())
    tokens = [token for burst in bursts for commit in burst for token in commit.token_ids]
    assert tokens == autoregressive(model, DecodeRequest((5, 6), 90), [])
    assert len(bursts) <= 2 < sum(map(len, bursts))
    check_books(inner)


def test_a_pause_ends_with_the_engine():
    inner = make_engine(tiny_model(4), window=4)
    front = AsyncEngine(lambda: inner, on_step=lambda _: time.sleep(0.01))  # else it is done before it is closed

    async def run() -> None:
        bursts = front.bursts(DecodeRequest((5, 6), 90, ENDLESS), lambda: 1000.0)
        assert await anext(bursts)
        front.close()
        rest = [commit async for burst in bursts for commit in burst]
        raise AssertionError(f"no error behind {rest}")

    with pytest.raises(EngineStoppedError):
        asyncio.run(run())


def test_says_when_an_abort_leaves_nothing_to_decode():
    inner = make_engine(tiny_model(4), window=4)
    said: list[str] = []
    front = AsyncEngine(lambda: inner, on_step=lambda _: said.append("step"), on_idle=lambda: said.append("idle"))

    async def leave_early() -> None:
        stream = front.stream(DecodeRequest((5, 6), 90, ENDLESS))
        await anext(stream)
        await stream.aclose()

    asyncio.run(leave_early())
    front.close()
    assert inner.num_unfinished == 0
    assert "step" in said
    assert said[-1] == "idle"


def test_closed_stream_leaves_nothing_behind(served):
    front, inner, model = served
    kept = DecodeRequest((3, 4), 30)

    async def leave_early() -> None:
        stream = front.stream(DecodeRequest((5, 6), 90, ENDLESS))
        await anext(stream)
        await stream.aclose()

    async def run():
        await asyncio.gather(*(leave_early() for _ in range(6)))
        return await collect(front, kept)

    assert asyncio.run(run()) == autoregressive(model, kept, [EOS])
    assert front.num_unfinished == inner.num_unfinished == 0
    check_books(inner)


def test_refused_request_harms_no_other(served):
    front, _, model = served
    good, bad = DecodeRequest((3, 4), 9), DecodeRequest((3,) * 90, 60)

    async def run():
        return await asyncio.gather(collect(front, good), collect(front, bad), return_exceptions=True)

    tokens, error = asyncio.run(run())
    assert tokens == autoregressive(model, good, [EOS])
    assert isinstance(error, InputError)


class Forgetful(Engine):
    """Gives up the request with key 1 in its third step."""

    def step(self, window: int | None = None) -> list[Commit]:
        commits = super().step(window)
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps != 3:
            return commits
        self.abort(1)
        raise RequestFailedError(1, "no reason", [commit for commit in commits if commit.row != 1])


def test_a_request_that_is_given_up_fails_alone():
    model = tiny_model(4)
    lean = make_engine(model, window=4)
    front = AsyncEngine(lambda: Forgetful(lean.model, lean.config, eos_ids=[EOS], pad_id=PAD))
    requests = [DecodeRequest((3, 4), 20), DecodeRequest((3, 5), 60, ENDLESS), DecodeRequest((3, 6), 20)]

    async def run():
        return await asyncio.gather(*(collect(front, request) for request in requests), return_exceptions=True)

    first, failed, last = asyncio.run(run())
    front.close()
    assert [first, last] == [autoregressive(model, request, [EOS]) for request in (requests[0], requests[2])]
    assert isinstance(failed, RequestFailedError)


def test_failing_step_ends_all_streams_and_refuses_later_ones():
    engine = make_engine(tiny_model(0), window=2)
    front = AsyncEngine(lambda: engine)
    front.wait_ready(30)

    async def run():
        stream = front.stream(DecodeRequest((3, 4), 90, ENDLESS))
        await anext(stream)
        engine.runner.cache.clear()  # the next forward has nowhere to write
        with pytest.raises(EngineStoppedError):
            async for _ in stream:
                pass
        with pytest.raises(EngineStoppedError):
            await collect(front, DecodeRequest((3, 4), 4))

    asyncio.run(run())


def test_error_while_building_is_raised_where_one_waits_for_it():
    def fail():
        raise InputError("no such checkpoint")

    with pytest.raises(InputError, match="no such checkpoint"):
        AsyncEngine(fail).wait_ready(30)


def test_steps_are_reported():
    steps = []
    engine = make_engine(tiny_model(4), window=4)
    front = AsyncEngine(lambda: engine, on_step=steps.append)
    tokens = asyncio.run(collect(front, DecodeRequest((3, 4), 20, ENDLESS)))
    front.close()
    assert sum(step.accepted for step in steps) == len(tokens) == 20
    assert {(step.rows, step.window) for step in steps} == {(1, 4)}
