"""Jacobi decoding inside vLLM as it runs in production: asynchronous scheduling and CUDA graphs, which CPUs lack."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from cllm.decoding.backend import stream
from cllm.decoding.records import DecodeRequest, SamplingParams
from cllm.models import load_tokenizer
from cllm.tasks.tokenizer import train_tokenizer
from cllm.vllm.config import PeerConfig
from cllm.vllm.llm import VllmBackend
from cllm.vllm.window import window_widths
from tests.fakes import tiny_model
from tests.vllm.making import PROMPTS

pytest.importorskip("vllm", reason="vLLM is not installed: pip install -e .[gpu]")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GUESSES, COUNT = 7, 48


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small weights: its answers repeat themselves, so that guesses hold now and then."""
    folder = tmp_path_factory.mktemp("checkpoints") / "target"
    tokenizer = train_tokenizer(("ab", "ba") * 4, 300)
    tiny_model(0, vocab_size=len(tokenizer), hidden=256, scale=0.05).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def opened(target: Path, method: str, **settings: object) -> Iterator[VllmBackend]:
    """With the scheduler in this process, so that its window can be seen; in float32, so that no tie decides."""
    small = {"max_tokens": 128, "max_rows": 16, "cache_bytes": 1 << 28, "dtype": "float32", "guesses": GUESSES}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        backend = VllmBackend(PeerConfig.model_validate({"method": method, "model": str(target)} | small | settings))
        yield backend
        backend.close()


def requests() -> list[DecodeRequest]:
    """Greedy and sampled ones, with the filters that the interpreter on CPUs cannot run."""
    samplings = [{}, {"temperature": 0.8, "top_k": 20}, {"temperature": 0.8, "top_p": 0.9}, {"temperature": 0.05}]
    return [
        DecodeRequest(prompt, COUNT, SamplingParams(ignore_eos=True, seed=7 * i + j, **sampling))
        for i, prompt in enumerate(PROMPTS)
        for j, sampling in enumerate(samplings)
    ]


def answers(backend: VllmBackend) -> list[tuple[int, ...]]:
    return [result.token_ids for result in backend.generate(requests())]


@pytest.fixture(scope="module")
def expected(target: Path) -> list[tuple[int, ...]]:
    with opened(target, "ar") as backend:
        assert backend.stats().runner == "V2"
        return answers(backend)


@pytest.mark.parametrize("guess", ["prompt", "pad", "ngram"])
def test_graphs_and_async_scheduling_change_no_token(target: Path, expected: list[tuple[int, ...]], guess: str) -> None:
    with opened(target, "jacobi", jacobi={"policy": "fixed", "guess": guess, "pad_id": 3}) as backend:
        assert answers(backend) == expected
        stats = backend.stats()
    assert (stats.runner, stats.scheduling, stats.guesses) == ("V2", "async", GUESSES)
    assert stats.acceptance is not None
    assert stats.acceptance.tokens_per_step > 1.05, "hardly a guess held: the test shows nothing"


def test_the_window_follows_step_times_that_were_measured(target: Path, expected: list[tuple[int, ...]]) -> None:
    with opened(target, "jacobi") as backend:
        windows = set()
        tokens: list[list[int]] = [[] for _ in expected]
        for commits in stream(backend, requests()):
            assert backend.last_step is not None
            windows.add(backend.last_step.window)
            for commit in commits:
                tokens[commit.row] += commit.token_ids
        costs = backend.llm.llm_engine.engine_core.engine_core.scheduler.step_costs  # type: ignore[union-attr]
    assert [tuple(row) for row in tokens] == expected
    assert windows <= set(window_widths(GUESSES + 1))
    assert costs.widths == window_widths(GUESSES + 1)
    assert (costs.milliseconds > 0).all()


def test_rows_with_a_grammar_keep_to_it_beside_others(target: Path, expected: list[tuple[int, ...]]) -> None:
    from vllm import SamplingParams as VllmParams
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import StructuredOutputsParams

    token = load_tokenizer(str(target)).convert_tokens_to_ids("a")
    params = [VllmParams(max_tokens=64, temperature=0, structured_outputs=StructuredOutputsParams(regex="a{12}"))] * 3
    plain = VllmParams(max_tokens=COUNT, temperature=0, ignore_eos=True, seed=0)
    prompts = [TokensPrompt(prompt_token_ids=[token] * (4 + i)) for i in range(3)]
    with opened(target, "jacobi", jacobi={"policy": "fixed"}) as backend:
        assert backend.llm is not None
        prompts.append(TokensPrompt(prompt_token_ids=list(PROMPTS[0])))
        *bound, free = backend.llm.generate(prompts, [*params, plain], use_tqdm=False)
    assert [output.outputs[0].text for output in bound] == ["a" * 12] * 3
    assert tuple(free.outputs[0].token_ids) == expected[0]
