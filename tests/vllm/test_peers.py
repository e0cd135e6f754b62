"""vLLM's methods through the `Backend` contract, beside our engine, with real vLLM on the CPU."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from cllm.decoding.backend import Backend, RequestFailedError, stream
from cllm.decoding.records import DecodeRequest, SamplingParams
from cllm.errors import InputError
from cllm.evaluation.decode import Engines, Method, decode, methods, open_engine
from cllm.evaluation.subject import Subject
from cllm.recipe import EvaluateConfig
from cllm.vllm.config import PeerConfig
from cllm.vllm.llm import VllmBackend
from tests.engine.making import make_engine
from tests.evaluation.runs import make_prompt
from tests.fakes import EOS, PAD
from tests.vllm.making import PROMPTS, greedy, make_eagle3, make_medusa, make_model, requests, vllm_in_process

pytest.importorskip("vllm", reason="vLLM is not installed: pip install -e .[cpu]")

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

    next(stream(backend, requests()))  # closed at once: nothing of it may be left
    commits = [commit for step in stream(backend, requests()) for commit in step]
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


def test_an_answer_that_vllm_gave_up_is_no_answer(target: tuple[Path, PreTrainedModel]) -> None:
    """vLLM ends answers that repeat themselves, if it is asked to: a reason that is neither stop nor length."""
    from vllm import SamplingParams as VllmParams
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import RepetitionDetectionParams, RequestOutputKind

    backend = open_backend(target[0], "ar")
    kept = backend.add(DecodeRequest(PROMPTS[0], 6, SamplingParams(ignore_eos=True)))
    lost = backend.add(DecodeRequest(PROMPTS[1], 1))
    backend.abort(lost)
    repeats = RepetitionDetectionParams(max_pattern_size=1, min_pattern_size=1, min_count=3)
    forced = {"allowed_token_ids": [9], "ignore_eos": True, "max_tokens": 20}
    params = VllmParams(**forced, repetition_detection=repeats, output_kind=RequestOutputKind.DELTA)
    backend.llm.llm_engine.add_request(f"stream-{lost}", TokensPrompt(prompt_token_ids=[3, 4]), params)  # type: ignore[union-attr]

    tokens, failures = 0, []
    while backend.num_unfinished:
        try:
            commits = backend.step()
        except RequestFailedError as error:
            failures.append((error.key, str(error)))
            commits = error.commits
        tokens += sum(len(commit.token_ids) for commit in commits if commit.row == kept)
    assert failures == [(lost, "the engine gave up a request: vLLM says repetition")]
    assert tokens == 6
    backend.close()


@pytest.fixture(params=["our engine", "vllm"])
def either(request: pytest.FixtureRequest, target: tuple[Path, PreTrainedModel]) -> Iterator[Backend]:
    """The same model, by methods that guess."""
    vllm = request.param == "vllm"
    backend = open_backend(target[0], "ngram", ngram_min=1) if vllm else make_engine(target[1], window=1 + GUESSES)
    yield backend
    backend.close()


def test_engine_and_vllm_are_interchangeable(either: Backend, expected: list[tuple[int, ...]]) -> None:
    before = either.stats()
    results = either.generate(requests())
    assert [result.token_ids for result in results] == expected
    stats = either.stats().since(before)
    assert stats.guesses == GUESSES
    assert stats.acceptance is not None
    committed = sum(len(result.token_ids) for result in results)
    # a row's last step may commit fewer tokens than its guesses would have given
    assert committed <= sum(result.num_forwards for result in results) + stats.acceptance.accepted
    assert stats.acceptance.accepted >= sum(max(0, n - 1) for r in results for n in r.accepted)
    assert stats.as_row()["tokens_per_step"] == stats.acceptance.tokens_per_step

    first, second = (either.add(request) for request in requests()[:2])
    commits = either.step()
    either.abort(first)
    assert either.num_unfinished == 1
    while either.num_unfinished:
        commits += either.step()
    assert sum((commit.token_ids for commit in commits if commit.row == second), ()) == expected[1]
    either.check()
    with pytest.raises(InputError, match="token 1000000 is not in the vocabulary"):
        either.add(DecodeRequest((10**6,), 4))
    with pytest.raises(InputError, match="max_new_tokens=500"):
        either.add(DecodeRequest((3,), 500))


def test_evaluation_decodes_with_vllm_as_with_our_engine(
    target: tuple[Path, PreTrainedModel], expected: list[tuple[int, ...]]
) -> None:
    config = EvaluateConfig(max_new_tokens=len(expected[0]), block_size=1 + GUESSES)
    prompts = [make_prompt(number, ids, (EOS,)) for number, ids in enumerate(PROMPTS)]
    subject = Subject(target[1], (EOS,), PAD)
    wanted = [tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens for tokens in expected]
    ar, _, jacobi = methods(config.block_size)

    def open_vllm(method: Method, subject: Subject, config: EvaluateConfig, **room: Any) -> Backend:
        return open_backend(target[0], "ar" if method.block_size == 1 else "ngram", max_rows=room["rows"])

    for method in (ar, jacobi):
        for opens in (open_engine, open_vllm):
            engines = Engines(subject, config, prompts, rows=4, record=False, opens=opens)
            results = decode(engines[method], prompts, config)
            assert [result.token_ids for result in results] == wanted
            assert [sum(result.accepted) for result in results] == [len(tokens) for tokens in wanted]
            engines[method].close()
