"""vLLM as a method of the matrix, with real vLLM on the CPU."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from cllm.bench.drafts import RUN_DRAFT
from cllm.bench.matrix import Platform
from cllm.bench.matrix_results import CellResult
from cllm.bench.measure import Workbench
from cllm.bench.methods import Room, VllmMethod, missing_part, open_vllm
from cllm.bench.plan import plan
from cllm.bench.served import serve
from cllm.layout import RunLayout
from cllm.models import create_model, load_tokenizer, save_model
from cllm.recipe import Recipe
from tests.bench.runs import make_scored_run, matrix_over
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


@pytest.fixture
def run(tmp_path: Path) -> Recipe:
    """A run with a draft, of models whose heads are large enough for vLLM's attention on CPUs."""
    recipe = make_scored_run(tmp_path / "run")
    layout, shape = RunLayout.of(recipe), recipe.teacher.scratch
    assert shape is not None
    wide = shape.model_copy(update={"hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "num_kv_heads": 2})
    tokenizer = load_tokenizer(str(layout.tokenizer))
    layers = {layout.finetuned: 2, layout.student: 2, layout.draft: 1}
    for seed, (folder, count) in enumerate(layers.items()):
        model = create_model(wide.model_copy(update={"num_layers": count}), tokenizer, seed)
        for parameter in model.parameters():
            parameter.data.mul_(8)  # spreads the logits, so that rounding never decides an argmax
        save_model(folder, model, tokenizer)
    return recipe


def test_cells_with_the_runs_own_draft_give_ars_tokens(run: Recipe, tmp_path: Path):
    vllm = {"kind": "vllm", "guesses": 2, "cache_bytes": 64 << 20, "cuda_graphs": False}
    drafted = vllm | {"method": "draft_model", "draft": RUN_DRAFT}
    methods = [{"kind": "ar"}, vllm, drafted, vllm | {"method": "medusa", "draft": RUN_DRAFT}]
    matrix = matrix_over(run, tmp_path / "results", methods=methods, models=["teacher"])
    found = plan(matrix, Platform(device="cpu", threads=1, versions={}))
    (reason,) = found.cannot_run
    assert "medusa: not trained yet; run jobs/baselines.py" in reason.why

    bench, results, decoders = Workbench(), {}, []
    for cell in found.cells:
        measured = bench.measure(cell, found.runs[cell.run_key])
        results[cell.method.label, cell.concurrency] = CellResult.from_data(measured, where=cell.title)
        opened = bench.shelf._open
        assert opened is not None
        decoders.append(opened.decoder)
    bench.close()
    assert len({result.response_digests for result in results.values()}) == 1
    assert len({id(decoder) for decoder in decoders}) == 3  # one start a method, not one a cell
    trained = {label: result.trained_parameters for (label, _), result in results.items()}
    assert trained["vllm ar"] == 0
    assert trained["vllm draft_model k=2"]
    for (label, _), result in results.items():
        assert sum(result.response_tokens) / sum(result.response_forwards) == pytest.approx(result.tpf)
        if label == "vllm ar":
            assert result.response_forwards == result.response_tokens
