"""vLLM as a method of the matrix, with real vLLM on the CPU."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from cllm.bench.methods import Room, VllmMethod, missing_part, open_vllm
from cllm.bench.served import serve
from tests.vllm.making import greedy, make_model, requests

pytest.importorskip("vllm", reason="vLLM is not installed: pip install cllm[cpu]")


@pytest.fixture(autouse=True)
def _in_process() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_USE_V2_MODEL_RUNNER"):
            patch.setenv(name, "0")
        patch.setenv("VLLM_NO_USAGE_STATS", "1")
        yield


@pytest.mark.parametrize("name", ["ar", "ngram"])
def test_served_in_a_closed_loop_it_gives_the_models_tokens(tmp_path: Path, name: str):
    model = make_model(tmp_path / "target")
    method = VllmMethod.model_validate({"method": name, "guesses": 3, "cache_bytes": 64 << 20, "cuda_graphs": False})
    todo = requests(12)
    path = str(tmp_path / "target")
    with closing(open_vllm(method, path, Room(2, 96), eos_ids=(), dtype=torch.float32)) as decoder:
        served = serve(decoder, todo, 2)
    assert list(served.tokens) == [greedy(model, request) for request in todo]
    if name == "ar":
        assert served.load.tokens_per_forward == 1


def test_a_missing_draft_is_named(tmp_path: Path):
    make_model(tmp_path / "target")
    why = missing_part(VllmMethod(method="medusa"), str(tmp_path / "target"))
    assert why is not None
    assert "needs draft checkpoint" in why
