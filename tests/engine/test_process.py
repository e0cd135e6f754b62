"""An engine in a child process decodes what it decodes in this one; what it refuses and how it ends is told."""

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import psutil
import pytest

from cllm.decoding.backend import RequestFailedError
from cllm.decoding.records import Commit, DecodeRequest, SamplingParams, TokenLogprob
from cllm.engine.async_engine import AsyncEngine, EngineStoppedError
from cllm.engine.engine import Engine
from cllm.engine.process import ProcessEngine, ProcessLostError
from cllm.errors import InputError
from tests.engine.making import make_engine
from tests.fakes import EOS, PAD, tiny_model

ENDLESS = SamplingParams(ignore_eos=True)
REQUESTS = [
    DecodeRequest((3 + i, 4, 5), 20, SamplingParams(temperature=i % 2, seed=i, logprobs=i % 3)) for i in range(7)
]
TOO_LONG = DecodeRequest((3,) * 200, 20)


class Faulty(Engine):
    """Gives up its second request in the third step, and fails in the sixth."""

    steps = 0

    def step(self, window: int | None = None) -> list[Commit]:
        self.steps += 1
        if self.steps == 6:
            raise UnpicklableError(lambda: None)
        commits = super().step(window)
        if self.steps != 3:
            return commits
        self.abort(1)
        raise RequestFailedError(1, "no reason", [commit for commit in commits if commit.row != 1])


class UnpicklableError(RuntimeError):
    pass


def load() -> Engine:
    return make_engine(tiny_model(3), window=5, overlap=True)


def load_faulty() -> Engine:
    lean = make_engine(tiny_model(3), window=5)
    return Faulty(lean.model, lean.config, eos_ids=[EOS], pad_id=PAD)


def refuse() -> Engine:
    raise InputError("no such checkpoint")


def die() -> Engine:
    os._exit(3)


@contextmanager
def apart(make: Callable[[], Engine] = load) -> Iterator[ProcessEngine]:
    others = set(multiprocessing.active_children())
    engine = ProcessEngine(make)
    try:
        yield engine
    finally:
        engine.close()
    assert set(multiprocessing.active_children()) <= others


def finish(engine: ProcessEngine) -> dict[int, tuple[int, ...]]:
    """Tokens by key of the requests that are in the engine."""
    tokens: dict[int, tuple[int, ...]] = {}
    while engine.num_unfinished:
        for commit in engine.step():
            tokens[commit.row] = tokens.get(commit.row, ()) + commit.token_ids
    return tokens


def flat(logprobs: Sequence[TokenLogprob]) -> list[float]:
    """Tokens and their log-probabilities, one behind the other."""
    return [number for token in logprobs for number in (token.logprob, *chain.from_iterable(token.top))]


def test_tokens_logprobs_guesses_and_statistics_are_those_of_the_engine_itself():
    inside = load()
    with apart() as engine:
        assert engine.generate(REQUESTS) == inside.generate(REQUESTS)
        ours, theirs = engine.stats().as_row(), inside.stats().as_row()
        assert ours == theirs
        one = REQUESTS[5]
        keys = engine.add(one), inside.add(one)
        seen: list[list[Commit]] = []
        for backend, key in zip((engine, inside), keys, strict=True):
            seen.append([])
            while backend.num_unfinished:
                commits = backend.step()
                assert all(commit.row == key for commit in commits)
                if commits:
                    assert backend.last_step is not None
                    assert backend.last_step.accepted == len(commits[0].token_ids)
                seen[-1] += commits
        for commit, other in zip(*seen, strict=True):
            assert replace(commit, row=0, logprobs=()) == replace(other, row=0, logprobs=())
            # The last bit of a sum depends on where its numbers lie in memory.
            assert flat(commit.logprobs) == pytest.approx(flat(other.logprobs), abs=1e-5)
        assert any(commit.guesses for commit in seen[0])
        assert all(commit.logprobs for commit in seen[0])


def test_requests_come_go_and_are_refused_beside_each_other():
    expected = [result.token_ids for result in load().generate(REQUESTS)]
    with apart() as engine:
        assert engine.step() == []  # there is nothing to wait for
        dropped = engine.add(DecodeRequest((9, 8), 60, ENDLESS))
        first = engine.add(REQUESTS[0])
        refused = engine.add(TOO_LONG)
        with pytest.raises(RequestFailedError) as found:
            finish(engine)
        assert found.value.key == refused
        assert isinstance(found.value.refusal, InputError)
        engine.abort(dropped)
        engine.abort(dropped)
        engine.abort(engine.add(TOO_LONG))
        second = engine.add(REQUESTS[2])
        tokens = finish(engine)
        assert set(tokens) <= {first, second}
        assert tokens[second] == expected[2]


def test_a_request_given_up_and_an_engine_that_fails_are_told():
    with apart(load_faulty) as engine:
        keys = [engine.add(DecodeRequest((3, 4 + i), 60, ENDLESS)) for i in range(2)]
        with pytest.raises(RequestFailedError, match="no reason") as found:
            finish(engine)
        assert found.value.key == keys[1]
        assert engine.num_unfinished == 1
        assert {commit.row for commit in found.value.commits} <= {keys[0]}
        with pytest.raises(RuntimeError, match="UnpicklableError"):
            finish(engine)


def test_what_goes_wrong_while_loading_is_raised():
    with pytest.raises(InputError, match="no such checkpoint"):
        ProcessEngine(refuse)
    with pytest.raises(ProcessLostError, match="exit code 3"):
        ProcessEngine(die)


async def collect(front: AsyncEngine, request: DecodeRequest) -> tuple[int, ...]:
    return tuple([token async for commit in front.stream(request) for token in commit.token_ids])


def test_asyncio_front_streams_refuses_and_notices_a_death():
    expected = [result.token_ids for result in load().generate(REQUESTS)]
    others = set(multiprocessing.active_children())

    async def run() -> None:
        found = await asyncio.gather(
            *(collect(front, request) for request in [*REQUESTS, TOO_LONG]), return_exceptions=True
        )
        assert found[:-1] == expected
        assert isinstance(found[-1], InputError)
        front.check()
        stream = front.stream(DecodeRequest((3, 4), 90, ENDLESS))
        await anext(stream)
        (child,) = set(multiprocessing.active_children()) - others
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(EngineStoppedError, match="exit code -9"):
            async for _ in stream:
                pass

    front = AsyncEngine(partial(ProcessEngine, load))
    front.wait_ready(120)
    asyncio.run(run())
    front.close()
    assert set(multiprocessing.active_children()) <= others


def test_the_child_dies_with_a_killed_parent(tmp_path: Path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import time\n"
        "from cllm.engine.process import ProcessEngine\n"
        "from tests.engine.test_process import load\n"
        "if __name__ == '__main__':\n"
        "    engine = ProcessEngine(load)\n"
        "    print(engine._process.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    root = Path(__file__).resolve().parents[2]
    parent = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(root)}
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
