"""vLLM's methods through the Backend interface, with real vLLM on the CPU."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from cllm.decoding.records import DecodeRequest, SamplingParams
from cllm.errors import InputError
from cllm.vllm.backend import Backend, EngineBackend
from cllm.vllm.config import PeerConfig
from cllm.vllm.llm import VllmBackend
from tests.engine.making import make_engine
from tests.vllm.making import PROMPTS, greedy, make_eagle3, make_medusa, make_model, requests, vllm_in_process

pytest.importorskip("vllm", reason="vLLM is not installed: pip install cllm[cpu]")

GUESSES = 3


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("checkpoints") / "target"
    return folder, make_model(folder)


@pytest.fixture(scope="module", autouse=True)
def _in_process() -> Iterator[None]:
    with vllm_in_process():
        yield


def open_backend(target: Path, method: str, **settings: object) -> VllmBackend:
    small = {"max_tokens": 96, "max_rows": 4, "cache_bytes": 64 << 20, "cuda_graphs": False, "tokenizer": False}
    defaults = {"method": method, "model": str(target), "dtype": "float32", "guesses": GUESSES}
    return VllmBackend(PeerConfig.model_validate(defaults | small | settings))


def answers(backend: Backend) -> list[tuple[int, ...]]:
    return [result.token_ids for result in backend.generate(requests())]


@pytest.fixture(scope="module")
def expected(target: tuple[Path, PreTrainedModel]) -> list[tuple[int, ...]]:
    return [greedy(target[1], request) for request in requests()]


def test_ar_equals_transformers_at_once_and_streamed(
    target: tuple[Path, PreTrainedModel], expected: list[tuple[int, ...]]
) -> None:
    ended = expected[0][: expected[0].index(expected[0][4]) + 1]
    backend = open_backend(target[0], "ar", eos_ids=(ended[-1],))
    assert answers(backend) == expected
    stats = backend.stats()
    assert (stats.package, stats.runner, stats.guesses, stats.acceptance) == ("vllm", "V1", 0, None)
    config = backend.llm.llm_engine.vllm_config  # type: ignore[union-attr]
    assert stats.scheduling == ("async" if config.scheduler_config.async_scheduling else "sync")

    next(backend.stream(requests()))  # closed at once: nothing of it may be left
    commits = [commit for step in backend.stream(requests()) for commit in step]
    for row, tokens in enumerate(expected):
        own = [commit for commit in commits if commit.row == row]
        assert [commit.token_ids for commit in own] == [(token,) for token in tokens]
        assert [commit.finish_reason for commit in own] == [None] * (len(tokens) - 1) + ["length"]

    (answer,) = backend.generate([DecodeRequest(PROMPTS[0], 20)])
    assert (answer.token_ids, answer.finish_reason, answer.num_forwards) == (ended, "stop", len(ended))
    with pytest.raises(InputError, match="stop: texts"):
        backend.generate([DecodeRequest(PROMPTS[0], 4, SamplingParams(stop=("a",)))])
    backend.close()


@pytest.mark.parametrize("method", ["ngram", "suffix"])
def test_methods_without_a_draft_equal_ar(
    target: tuple[Path, PreTrainedModel], expected: list[tuple[int, ...]], method: str
) -> None:
    if method == "suffix":
        pytest.importorskip("arctic_inference", reason="no arctic-inference: pip install arctic-inference==0.1.1")
    backend = open_backend(target[0], method, ngram_min=1)
    assert answers(backend) == expected
    acceptance = backend.stats().acceptance
    assert acceptance is not None
    assert acceptance.steps > 0
    assert acceptance.accepted == sum(acceptance.accepted_at) <= acceptance.proposed
    backend.close()


def test_a_draft_equal_to_its_target_is_always_accepted(
    target: tuple[Path, PreTrainedModel], expected: list[tuple[int, ...]]
) -> None:
    backend = open_backend(target[0], "draft_model", draft=str(target[0]))
    assert answers(backend) == expected
    acceptance = backend.stats().acceptance
    assert acceptance is not None
    assert acceptance.accepted >= 0.8 * acceptance.proposed  # a row's last steps reach beyond its end
    assert acceptance.tokens_per_step > 0.8 * (1 + GUESSES)
    backend.close()


def test_another_draft_and_heads_of_both_kinds_are_lossless(
    target: tuple[Path, PreTrainedModel], expected: list[tuple[int, ...]], tmp_path: Path
) -> None:
    make_model(tmp_path / "draft", seed=1, layers=1)
    make_medusa(tmp_path / "medusa", heads=GUESSES)
    make_eagle3(tmp_path / "eagle3", target[1])
    for method in ("draft_model", "medusa", "eagle3"):
        draft = tmp_path / method.partition("_")[0]
        backend = open_backend(target[0], method, draft=str(draft))
        assert answers(backend) == expected
        stats = backend.stats()
        assert stats.method == method
        assert stats.guesses == GUESSES
        assert stats.acceptance is not None
        assert stats.acceptance.accepted < 0.5 * stats.acceptance.proposed
        assert stats.as_row()["guesses_steps"] == stats.acceptance.steps
        backend.close()


def test_jacobi_on_the_other_model_runner_is_refused(target: tuple[Path, PreTrainedModel]) -> None:
    with pytest.raises(InputError, match=r"VLLM_USE_V2_MODEL_RUNNER: .* this engine uses V1"):
        open_backend(target[0], "jacobi")


def test_engine_and_vllm_are_interchangeable(
    target: tuple[Path, PreTrainedModel], expected: list[tuple[int, ...]]
) -> None:
    backend: Backend = EngineBackend(make_engine(target[1], window=4))
    results = backend.generate(requests())
    assert [result.token_ids for result in results] == expected
    stats = backend.stats()
    assert stats.acceptance is not None
    committed = sum(len(result.token_ids) for result in results)
    # a row's last step may commit fewer tokens than its guesses would have given
    assert committed <= stats.acceptance.steps + stats.acceptance.accepted + len(results) * 3
    assert sum(result.num_forwards or 0 for result in results) == stats.acceptance.steps
    backend.close()
