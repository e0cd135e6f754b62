"""Replicas of two processes, each with half of the model, on the CPU."""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from openai import OpenAI

from cllm.engine.shards import FollowerLostError
from cllm.errors import InputError
from serving.replica import Replica
from tests.serving.deployed import deployed, replica_pids
from tests.serving.running import CONTEXT, chunks_of, model_entry, text_of, wait_until

SHARDED = "sharded"
APP_NAME = f"shards{os.getpid()}"
# The ranks measure step times together, and rank 0 alone chooses the windows by them.
ADAPTIVE = {"window": 8, "policy": "adaptive", "max_rows": 8, "max_tokens": CONTEXT, "block_tokens": 8}
PROMPTS = ("How many", "SELECT", "grün und")


def followers() -> list[multiprocessing.process.BaseProcess]:
    """Of engines in this process; the engine of `replica` has a process, too."""
    return [child for child in multiprocessing.active_children() if child.name.startswith("rank")]


@pytest.fixture
def sharded(model_folder: Path) -> Iterator[Replica]:
    replica = Replica(SHARDED, model_entry(model_folder, shards=2, options=ADAPTIVE))
    yield replica
    replica.close()
    assert not followers()


def test_its_texts_are_those_of_one_process_and_a_dead_follower_fails_the_health_check(
    sharded: Replica, replica: Replica
) -> None:
    for sampling in ({}, {"temperature": 1.0, "seed": 7}):
        for prompt in PROMPTS:
            chunks = chunks_of(sharded, prompt, 40, **sampling)
            assert text_of(chunks) == text_of(chunks_of(replica, prompt, 40, **sampling))
            assert chunks[-1].finish_reason is not None
    sharded.check_health()
    (follower,) = followers()
    follower.kill()
    follower.join()
    with pytest.raises(FollowerLostError, match="rank 1 of the engine has died"):
        sharded.check_health()


def test_an_engine_that_stands_still_fails_the_health_check_until_it_goes_on(
    model_folder: Path, replica: Replica
) -> None:
    """Its second process is stopped, not ended, so the first one waits for it in the middle of a step."""
    stalling = Replica(SHARDED, model_entry(model_folder, shards=2, options=ADAPTIVE, stall_s=0.5))
    chunks_of(stalling, PROMPTS[0], 4)
    (follower,) = (psutil.Process(child.pid) for child in followers())

    def is_stuck() -> bool:
        try:
            stalling.check_health()
        except RuntimeError as error:
            return "no step for a long time, and 1 requests wait" in str(error)
        return False

    follower.suspend()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(chunks_of, stalling, PROMPTS[0], 40)
        try:
            wait_until(is_stuck)
        finally:
            follower.resume()
        assert text_of(answer.result()) == text_of(chunks_of(replica, PROMPTS[0], 40))
    assert not is_stuck()
    stalling.close()


def test_a_model_that_cannot_be_divided_is_refused(model_folder: Path) -> None:
    with pytest.raises(InputError, match="num_key_value_heads=2 cannot be divided among 3 ranks"):
        Replica(SHARDED, model_entry(model_folder, shards=3))
    assert not followers()


def is_running(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.ray
def test_in_serve_a_killed_replica_takes_its_followers_along_and_is_replaced(
    model_folder: Path, replica: Replica
) -> None:
    args = {"models": {SHARDED: model_entry(model_folder, shards=2).model_dump()}, "ingress": {"cpus": 0.1}}
    expected = text_of(chunks_of(replica, PROMPTS[0], 40))
    with deployed(args, APP_NAME) as url:

        def ask() -> str:
            client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120)
            options = {"model": SHARDED, "prompt": PROMPTS[0], "max_tokens": 40, "temperature": 0}
            return client.completions.create(**options).choices[0].text

        assert ask() == expected
        (victim,) = replica_pids(APP_NAME, SHARDED)
        family = psutil.Process(victim).children(recursive=True)
        assert any(map(is_running, family))
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: not any(map(is_running, family)))
        wait_until(lambda: replica_pids(APP_NAME, SHARDED) not in ([], [victim]))
        assert ask() == expected
