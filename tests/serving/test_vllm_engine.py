"""vLLM as the engine of a replica, beside our own: real vLLM on the CPU."""

import asyncio
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from cllm.decoding.records import SamplingParams
from cllm.errors import InputError
from serving.config import VllmModel
from serving.errors import ReplicaLostError
from serving.messages import GenerateRequest
from serving.replica import Replica
from serving.retry import RetryingBackend
from tests.serving.running import (
    CONTEXT,
    chunks_of,
    local_app,
    model_entry,
    save_tiny_model,
    serving_on_a_port,
    text_of,
    wait_until,
)
from tests.serving.test_retry import LosingBackend, collect, joined
from tests.vllm.making import vllm_in_process

pytest.importorskip("vllm", reason="vLLM is not installed: pip install -e .[cpu]")

ROOT = Path(__file__).parents[2]
PROMPTS = ("How many", "SELECT count", "grün und", "名前")
COUNT = 40
SMALL = {"dtype": "float32", "max_tokens": CONTEXT, "max_rows": 4, "cache_bytes": 64 << 20, "cuda_graphs": False}


@pytest.fixture(scope="module", autouse=True)
def _in_process() -> Iterator[None]:
    with vllm_in_process():
        yield


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vLLM's attention on CPUs has no heads smaller than 32."""
    return save_tiny_model(tmp_path_factory.mktemp("wide"), hidden=128)


@pytest.fixture(scope="module")
def ours(wide_folder: Path) -> Iterator[Replica]:
    replica = Replica("ours", model_entry(wide_folder))
    yield replica
    replica.close()


@pytest.fixture(scope="module")
def vllm_ar(wide_folder: Path) -> Iterator[Replica]:
    replica = Replica("vllm", vllm_entry(wide_folder, "ar"))
    yield replica
    replica.close()


def vllm_entry(folder: Path, method: str, *, engine_args: dict[str, Any] | None = None, **options: Any) -> VllmModel:
    data = {"engine": "vllm", "path": str(folder), "options": SMALL | {"method": method} | options, "cpus": 0.1}
    return VllmModel.model_validate(data | {"engine_args": engine_args or {}})


def test_its_greedy_texts_are_ours_one_chunk_a_step(vllm_ar: Replica, ours: Replica) -> None:
    for prompt in PROMPTS:
        chunks = chunks_of(vllm_ar, prompt, COUNT)
        expected = chunks_of(ours, prompt, COUNT)
        assert text_of(chunks) == text_of(expected)
        assert [len(chunk.token_ids) for chunk in chunks] == [1] * len(chunks)
        assert chunks[-1].finish_reason == expected[-1].finish_reason
    vllm_ar.check_health()


def test_stop_texts_and_log_probabilities_are_ours(vllm_ar: Replica, ours: Replica) -> None:
    whole = text_of(chunks_of(ours, PROMPTS[0], COUNT))
    stop = whole[10:12]
    (mine, theirs) = (chunks_of(replica, PROMPTS[0], COUNT, stop=(stop,)) for replica in (ours, vllm_ar))
    assert text_of(mine) == text_of(theirs) == whole[: whole.index(stop)]
    assert theirs[-1].finish_reason == "stop"
    scores = [
        [score for chunk in chunks_of(replica, PROMPTS[1], 8, logprobs=3) for score in chunk.scores]
        for replica in (ours, vllm_ar)
    ]
    assert len(scores[1]) == 8
    for own, other in zip(*scores, strict=True):
        assert own.text == other.text
        assert own.logprob == pytest.approx(other.logprob, abs=1e-3)
        assert [text for text, _ in own.top] == [text for text, _ in other.top]


def test_an_abandoned_stream_frees_its_row(vllm_ar: Replica) -> None:
    sampling = SamplingParams(ignore_eos=True)

    async def leave_early() -> None:
        chunks = vllm_ar.generate(GenerateRequest("test", PROMPTS[0], 150, sampling, time.time()))
        await anext(chunks)
        await chunks.aclose()

    async def run() -> None:
        await asyncio.gather(*(leave_early() for _ in range(12)))  # three times the rows that there are

    asyncio.run(run())
    wait_until(lambda: vllm_ar.num_unfinished() == 0)
    assert len(chunks_of(vllm_ar, PROMPTS[0], 5)) == 5
    vllm_ar.check_health()


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(ignore_eos=True),
        SamplingParams(min_tokens=35),
        SamplingParams(frequency_penalty=1.0, presence_penalty=0.5),  # vLLM has to decode all of it once more
    ],
    ids=["greedy", "min_tokens", "penalties"],
)
def test_a_response_goes_on_when_its_replica_is_lost(vllm_ar: Replica, sampling: SamplingParams) -> None:
    losing = LosingBackend(vllm_ar, 3)
    survived = collect(RetryingBackend(losing, attempts=2, resume_s=60), sampling)
    assert joined(survived) == joined(collect(vllm_ar, sampling))
    assert len(losing.asked) > 5


def test_what_it_refuses_it_refuses_as_we_do(vllm_ar: Replica, ours: Replica) -> None:
    asked: list[tuple[Any, int, dict[str, Any]]] = [
        (PROMPTS[0], CONTEXT, {}),
        ((10**6,), 4, {}),
        (PROMPTS[0], 4, {"stop_token_ids": (10**6,)}),
        ((5,) * CONTEXT, 4, {}),
    ]
    for prompt, count, sampling in asked:
        errors = []
        for replica in (vllm_ar, ours):
            with pytest.raises(InputError) as error:
                chunks_of(replica, prompt, count, **sampling)
            errors.append(str(error.value))
        assert errors[0] == errors[1]
    assert len(chunks_of(vllm_ar, PROMPTS[0], 5)) == 5


def test_both_kinds_answer_side_by_side_and_streamed_equals_whole(vllm_ar: Replica, ours: Replica) -> None:
    with serving_on_a_port(local_app({"ours": ours, "vllm": vllm_ar})) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        texts = set()
        for model in ("ours", "vllm"):
            asked: dict[str, Any] = {"model": model, "prompt": "How many", "max_tokens": COUNT, "temperature": 0}
            texts.add(client.completions.create(**asked).choices[0].text)
            texts.add("".join(chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True)))
    assert len(texts) == 1


def test_a_draft_equal_to_the_model_gives_several_tokens_a_chunk(wide_folder: Path, ours: Replica) -> None:
    replica = Replica("draft", vllm_entry(wide_folder, "draft_model", draft=str(wide_folder), guesses=3))
    chunks = chunks_of(replica, PROMPTS[0], COUNT)
    replica.close()
    assert text_of(chunks) == text_of(chunks_of(ours, PROMPTS[0], COUNT))
    assert COUNT / len(chunks) > 3


def test_an_unknown_engine_argument_is_named(wide_folder: Path) -> None:
    with pytest.raises(InputError, match="engine_args: vLLM has no engine argument 'max_model_length'"):
        Replica("wrong", vllm_entry(wide_folder, "ar", engine_args={"max_model_length": 5}))


@pytest.mark.slow
def test_jacobi_in_vllm_gives_our_texts(wide_folder: Path, ours: Replica) -> None:
    command = [sys.executable, "-m", "tests.serving.interpreted", str(wide_folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    for prompt, chunks in zip(PROMPTS, answers, strict=False):
        assert "".join(chunk["text"] for chunk in chunks) == text_of(chunks_of(ours, prompt, COUNT, ignore_eos=True))
        assert sum(len(chunk["token_ids"]) for chunk in chunks) == COUNT


@pytest.mark.slow
def test_a_model_divided_among_processes_gives_our_texts_and_tells_of_a_death(
    wide_folder: Path, ours: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    before = set(multiprocessing.active_children())
    replica = Replica("divided", vllm_entry(wide_folder, "ar").model_copy(update={"shards": 2}))
    assert text_of(chunks_of(replica, PROMPTS[0], COUNT)) == text_of(chunks_of(ours, PROMPTS[0], COUNT))
    replica.check_health()
    worker, _ = set(multiprocessing.active_children()) - before
    worker.kill()
    worker.join()

    def told() -> bool:
        try:
            replica.check_health()
        except RuntimeError as error:
            return "a process of vLLM has died" in str(error)
        return False

    wait_until(told)
    with pytest.raises(ReplicaLostError):
        chunks_of(replica, PROMPTS[0], COUNT)
    replica.close()
    wait_until(lambda: set(multiprocessing.active_children()) <= before)
