"""One Serve application with two replicas of our engine and vLLM beside them, asked as users ask."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest
from openai import OpenAI

from tests.serving.deployed import deployed, replica_pids, samples
from tests.serving.running import CONTEXT, model_entry, save_tiny_model, wait_until

pytest.importorskip("vllm", reason="vLLM is not installed: pip install -e .[cpu]")
pytestmark = pytest.mark.ray

APP_NAME = "beside-vllm"
PROMPTS = ("How many", "SELECT count", "grün und", "名前")
OPTIONS = {
    "method": "ar", "dtype": "float32", "max_tokens": CONTEXT, "max_rows": 4, "cache_bytes": 64 << 20,
    "cuda_graphs": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = save_tiny_model(tmp_path_factory.mktemp("wide"), hidden=128)  # vLLM's CPU attention wants heads of 32
    peer = {"engine": "vllm", "path": str(folder), "options": OPTIONS, "cpus": 0.1}
    models = {"jacobi": model_entry(folder, replicas=2).model_dump(), "vllm-ar": peer}
    with deployed({"models": models, "ingress": {"cpus": 0.1}}, APP_NAME) as address:
        yield address


def test_both_engines_give_the_same_texts_to_the_openai_client(url: str) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    assert {model.id for model in client.models.list()} == {"jacobi", "vllm-ar"}
    for prompt in PROMPTS:
        asked: dict[str, Any] = {"prompt": prompt, "max_tokens": 40, "temperature": 0.0}
        whole = {m: client.completions.create(model=m, **asked).choices[0] for m in ("jacobi", "vllm-ar")}
        assert whole["jacobi"].text == whole["vllm-ar"].text
        assert whole["jacobi"].finish_reason == whole["vllm-ar"].finish_reason
        for model, choice in whole.items():
            chunks = client.completions.create(model=model, stream=True, **asked)
            assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text


@pytest.mark.parametrize("model", ["jacobi", "vllm-ar"])
def test_the_raw_stream_is_server_sent_events(url: str, model: str) -> None:
    asked = {"model": model, "prompt": PROMPTS[0], "max_tokens": 24, "temperature": 0.0}
    whole = httpx.post(f"{url}/v1/completions", json=asked, timeout=120).json()
    with httpx.stream("POST", f"{url}/v1/completions", json=asked | {"stream": True}, timeout=120) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    *events, last = (line.removeprefix("data: ") for line in lines)
    assert last == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == whole["choices"][0]["text"]


def test_vllm_tells_of_its_steps(url: str) -> None:
    names = {"ray_cllm_batch_rows", "ray_cllm_waiting_requests", "ray_cllm_window_tokens", "ray_cllm_cache_used_ratio"}
    wait_until(lambda: names <= samples(url, model="vllm-ar").keys())


def test_a_replica_of_vllm_is_one_process_so_that_nothing_outlives_it(url: str) -> None:
    (replica,) = replica_pids(APP_NAME, "vllm-ar")
    assert psutil.Process(replica).children() == []
