"""Decoders are used again where they have the room; models once loaded stay; and what each method has trained."""

import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model

from cllm.bench.drafts import RUN_DRAFT, draft_weights, placed
from cllm.bench.energy import energy_counter
from cllm.bench.matrix import Cell, Platform
from cllm.bench.memory import memory_needed
from cllm.bench.methods import ArMethod, JacobiMethod, MethodConfig, Room, VllmMethod
from cllm.bench.parameters import model_parameters, trained_parameters
from cllm.bench.plan import plan
from cllm.bench.prompts import Run
from cllm.bench.shelf import Shelf
from cllm.bench.timing import Speeds, time_repeats
from cllm.decoding.records import DecodeRequest
from cllm.engine.config import EngineConfig
from cllm.engine.load import block_bytes
from cllm.errors import InputError
from cllm.evaluation.subject import load_subject
from cllm.layout import RunLayout
from cllm.models import load_model
from cllm.recipe import LoraConfig, Recipe
from cllm.training.medusa import MedusaHeads, save_heads
from tests.bench.records import make_cell
from tests.bench.runs import matrix_over
from tests.bench.test_measure import Scripted
from tests.fakes import tiny_model


def cell_of(method: ArMethod | JacobiMethod, concurrency: int = 1) -> Cell:
    return make_cell(method, run="debug", concurrency=concurrency)


def test_a_decoder_serves_cells_that_need_no_more_room(tiny_run: Recipe) -> None:
    shelf, run, jacobi = Shelf(torch.device("cpu")), Run(tiny_run), JacobiMethod(window=4)
    wide = shelf.decoder(cell_of(jacobi, 4), run, Room(4, 64))
    subject = shelf.subject(cell_of(jacobi), run)
    assert shelf.decoder(cell_of(jacobi, 1), run, Room(1, 64)) is wide
    assert shelf.decoder(cell_of(jacobi, 1), run, Room(1, 32)) is not wide  # other requests, other tables
    wide = shelf.decoder(cell_of(jacobi, 4), run, Room(4, 64))
    assert shelf.decoder(cell_of(jacobi, 8), run, Room(8, 64)) is not wide
    assert shelf.decoder(cell_of(ArMethod(), 1), run, Room(1, 64)) is not wide
    assert shelf.subject(cell_of(ArMethod()), run) is subject
    cllm = make_cell(ArMethod(), run="debug", model="cllm")
    assert shelf.subject(cllm, run) is not subject


def test_cells_come_with_the_most_requests_first(tiny_run: Recipe, tmp_path: Path) -> None:
    matrix = matrix_over(tiny_run, tmp_path, concurrencies=[1, 4, 2], methods=[{"kind": "ar"}, {"kind": "jacobi"}])
    found = plan(matrix, Platform(device="cpu", threads=1, versions={})).cells
    assert [(cell.method.kind, cell.concurrency) for cell in found if cell.model == "cllm"] == [
        (kind, concurrency) for kind in ("ar", "jacobi") for concurrency in (4, 2, 1)
    ]


def test_energy_is_per_new_token_of_each_repeat() -> None:
    decoder = Scripted()
    requests = [DecodeRequest((3,), count) for count in (5, 2, 4)]
    load = {"concurrency": 1, "repeats": 3}
    found = time_repeats(decoder, [requests, requests[:1]], **load, energy=lambda: 20 * decoder.time)  # 20 W
    # One after the other, two tokens a step of 10 ms: 3 + 1 + 2 and 3 steps for 11 and 5 tokens.
    assert found.energy_j == pytest.approx([20 * 0.09 / 16] * 3)
    assert time_repeats(decoder, [requests], **load, energy=None).energy_j == ()
    assert time_repeats(decoder, [requests], concurrency=1, repeats=0, energy=None) == Speeds()


def test_a_cpu_has_no_counter() -> None:
    assert energy_counter(torch.device("cpu")) is None


def test_parameters_are_those_of_the_loaded_model(tiny_run: Recipe) -> None:
    model = load_model(str(RunLayout.of(tiny_run).student))
    assert model_parameters("cllm", tiny_run) == model.num_parameters()
    assert trained_parameters(ArMethod(), "teacher", tiny_run) == 0
    assert trained_parameters(ArMethod(), "cllm", tiny_run) == model.num_parameters()


def test_adapters_are_what_peft_would_train(tiny_run: Recipe) -> None:
    lora = LoraConfig(rank=3, target_modules=("q_proj", "down_proj"))
    recipe = tiny_run.model_copy(update={"train": tiny_run.train.model_copy(update={"lora": lora})})
    model = load_model(str(RunLayout.of(tiny_run).student))
    adapted = get_peft_model(model, PeftConfig(r=3, target_modules=list(lora.target_modules)))
    wanted = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trained_parameters(ArMethod(), "cllm", recipe) == wanted


def test_the_runs_own_draft(tiny_run: Recipe, tmp_path: Path) -> None:
    recipe = tiny_run.model_copy(update={"output": str(tmp_path)})
    method = VllmMethod(method="draft_model", draft=RUN_DRAFT)
    with pytest.raises(InputError, match=r"draft: not trained yet; run jobs/baselines\.py"):
        placed(method, recipe, "teacher")
    draft = tiny_model(layers=1)
    draft.save_pretrained(RunLayout.of(recipe).draft)
    ready = placed(method, recipe, "teacher")
    assert isinstance(ready.method, VllmMethod)
    assert ready.method.draft == str(RunLayout.of(recipe).draft)
    assert (ready.path, ready.own_model) == (str(RunLayout.of(recipe).finetuned), False)
    assert trained_parameters(method, "teacher", recipe) == sum(math.prod(p.shape) for p in draft.parameters())
    before = draft_weights(ready)
    tiny_model(5, layers=1).save_pretrained(RunLayout.of(recipe).draft)
    assert draft_weights(ready) != before


def test_drafts_that_are_not_for_a_model(tiny_run: Recipe) -> None:
    medusa = VllmMethod(method="medusa", draft=RUN_DRAFT)
    with pytest.raises(InputError, match="read the hidden states of its teacher"):
        placed(medusa, tiny_run, "cllm")
    with pytest.raises(InputError, match="runs train none for vLLM's method eagle3"):
        placed(VllmMethod(method="eagle3", draft=RUN_DRAFT), tiny_run, "teacher")
    assert placed(ArMethod(), tiny_run, "cllm").method == ArMethod()
    assert trained_parameters(VllmMethod(method="medusa", draft="somebody/heads"), "teacher", tiny_run) is None


def test_medusa_2_brings_the_model_that_was_trained_with_its_heads(tiny_run: Recipe, tmp_path: Path) -> None:
    joint = tiny_run.with_overrides(["baselines.medusa.variant=2", f"output={tmp_path}"])
    medusa, folder = VllmMethod(method="medusa", draft=RUN_DRAFT), RunLayout.of(joint).medusa
    model = tiny_model(layers=1)
    folder.mkdir()
    save_heads(folder, MedusaHeads.of(model, 2).state_dict())
    with pytest.raises(InputError, match=r"medusa/model: not trained yet; run jobs/baselines\.py"):
        placed(medusa, joint, "teacher")
    model.save_pretrained(folder / "model")
    ready = placed(medusa, joint, "teacher")
    assert (ready.path, ready.own_model) == (str(folder / "model"), True)
    heads = sum(tensor.numel() for tensor in MedusaHeads.of(model, 2).state_dict().values())
    assert trained_parameters(medusa, "teacher", joint) == model.num_parameters() + heads
    before = draft_weights(ready)
    tiny_model(5, layers=1).save_pretrained(folder / "model")  # the same heads, another model
    assert draft_weights(ready) != before


@pytest.mark.parametrize("rows", [1, 3])
def test_memory_is_weights_and_cache_as_the_engine_counts_them(tiny_run: Recipe, rows: int) -> None:
    subject = load_subject("teacher", tiny_run, torch.device("cpu"))
    weights = 4 * subject.model.num_parameters()
    block = block_bytes(subject.decoder, EngineConfig(block_tokens=1))

    def needed(method: MethodConfig) -> int | None:
        return memory_needed(placed(method, tiny_run, "teacher"), Room(rows, 50), torch.float32)

    assert needed(ArMethod()) == weights + rows * 50 * block
    assert needed(JacobiMethod(window=4)) == weights + rows * 53 * block
    assert needed(VllmMethod()) == needed(ArMethod())  # whatever vLLM reserves
    assert needed(VllmMethod(method="ngram", guesses=3)) == needed(JacobiMethod(window=4))


def test_memory_of_drafts(tiny_run: Recipe, tmp_path: Path) -> None:
    draft, target = tiny_model(layers=1), tiny_model(layers=2)
    draft.save_pretrained(tmp_path / "draft")
    heads = MedusaHeads.of(target, 3).state_dict()
    (tmp_path / "heads").mkdir()
    save_heads(tmp_path / "heads", heads)

    def needed(name: str, folder: str | None) -> int:
        method = VllmMethod.model_validate({"method": name, "draft": folder, "guesses": 3})
        found = memory_needed(placed(method, tiny_run, "teacher"), Room(1, 50), torch.float32)
        assert found is not None
        return found

    alone = needed("ngram", None)
    cache = 2 * 53 * draft.config.num_key_value_heads * draft.config.head_dim
    assert needed("draft_model", str(tmp_path / "draft")) - alone == 4 * (draft.num_parameters() + cache)
    assert needed("medusa", str(tmp_path / "heads")) - alone == 4 * sum(tensor.numel() for tensor in heads.values())
    elsewhere = placed(VllmMethod(method="medusa", draft="somebody/heads"), tiny_run, "teacher")
    assert memory_needed(elsewhere, Room(1, 50), torch.float32) is None
