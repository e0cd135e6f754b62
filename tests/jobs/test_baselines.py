"""The job of the baselines: outputs that vLLM's checks accept, kept when they are there, and every mistake named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cllm.artifacts import input_difference, read_manifest
from cllm.models import create_model, load_tokenizer, save_model
from cllm.recipe import ScratchConfig
from cllm.tasks.tokenizer import train_tokenizer
from cllm.vllm.config import PeerConfig
from cllm.vllm.drafts import check_draft
from jobs import baselines, stages
from jobs.cli import main
from tests.jobs.running import FinishedRun, arguments
from tests.jobs.test_bad_input import fails

pytestmark = pytest.mark.ray

FEW = ("baselines.draft.optim.steps=4", "baselines.medusa.optim.steps=4")
JOINT = ("baselines.draft=null", "baselines.medusa.variant=2", "baselines.medusa.optim.steps=4")


def made(pipeline: FinishedRun, root: Path, overrides: tuple[str, ...]) -> FinishedRun:
    run = pipeline.copy(root, "prompts", "teacher", "trajectories")
    run = FinishedRun(run.recipe.with_overrides(overrides), (*run.overrides, *overrides), run.done)
    assert main(baselines.run, None, arguments(run.overrides)) == 0
    return run


@pytest.fixture(scope="module")
def run(pipeline: FinishedRun, tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> FinishedRun:
    """Draft model and Medusa-1 heads beside the run's teacher. No test changes them."""
    return made(pipeline, tmp_path_factory.mktemp("baselines") / "run", FEW)


@pytest.fixture(scope="module")
def joint(pipeline: FinishedRun, tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> FinishedRun:
    """Medusa-2."""
    return made(pipeline, tmp_path_factory.mktemp("joint") / "run", JOINT)


def test_outputs_are_whole_and_say_what_made_them(run: FinishedRun) -> None:
    for output in (stages.draft(run.recipe), stages.medusa(run.recipe)):
        manifest = read_manifest(output.path, output.kind)
        assert input_difference(manifest, output.inputs) is None
    # What the CLLM is made from, no more and no less.
    assert stages.draft(run.recipe).inputs.keys() - {"draft"} == stages.train(run.recipe).inputs.keys() - {"train"}
    assert not list(run.layout.scratch.glob("*-*"))  # no checkpoint is left


def test_exports_are_what_vllms_checks_accept(run: FinishedRun, joint: FinishedRun) -> None:
    teacher = str(run.layout.finetuned)
    check_draft(PeerConfig(method="draft_model", model=teacher, draft=str(run.layout.draft)))
    check_draft(PeerConfig(method="medusa", model=teacher, draft=str(run.layout.medusa), guesses=3))
    together = joint.layout.medusa
    check_draft(PeerConfig(method="medusa", model=str(together / "model"), draft=str(together), guesses=3))


def test_the_draft_is_a_small_plain_checkpoint(run: FinishedRun) -> None:
    draft, teacher = (AutoModelForCausalLM.from_pretrained(p) for p in (run.layout.draft, run.layout.finetuned))
    assert draft.config.hidden_size == 16
    assert draft.config.vocab_size == teacher.config.vocab_size
    assert load_tokenizer(str(run.layout.draft)).get_vocab() == load_tokenizer(str(run.layout.tokenizer)).get_vocab()


def test_heads_begin_at_the_teachers_projection_and_are_trained(run: FinishedRun) -> None:
    weights = load_file(run.layout.medusa / "model.safetensors")
    projection = AutoModelForCausalLM.from_pretrained(run.layout.finetuned).lm_head.weight
    for head in range(3):
        change = (weights[f"lm_heads.{head}.weight"] - projection).abs().max()
        assert 0 < change < 0.05
        assert weights[f"blocks.{head}.layers.0.weight"].abs().max() > 0


def test_medusa_2_exports_the_model_that_it_trained(run: FinishedRun, joint: FinishedRun) -> None:
    assert not (run.layout.medusa / "model").exists()
    before, after = (
        AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (joint.layout.finetuned, joint.layout.medusa / "model")
    )
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    weights = load_file(joint.layout.medusa / "model.safetensors")
    assert len(weights) == 9  # no weight of the model among them


def test_outputs_that_are_there_are_kept(run: FinishedRun, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(baselines.run, None, arguments(run.overrides)) == 0
    assert capsys.readouterr().out.count("up to date") == 2


def test_the_pipeline_does_not_make_them(pipeline: FinishedRun) -> None:
    assert not pipeline.layout.draft.exists()
    assert not pipeline.layout.medusa.exists()


def test_a_pretrained_draft_is_trained_from_where_it_is(
    run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a tiny learning rate it stays what it was. Its folder is given relative, and the workers run elsewhere."""
    other = run.copy(tmp_path / "run", "prompts", "teacher", "trajectories", "draft")
    start = Path("start")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        shutil.move(other.layout.draft, start)
        source = 'baselines.draft={"path": "start", "optim": {"steps": 2, "learning_rate": 1e-9, "row_tokens": 512}}'
        assert main(baselines.run, None, arguments((*other.overrides, source, "baselines.medusa=null"))) == 0
        before, after = (load_file(folder / "model.safetensors") for folder in (start, other.layout.draft))
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6)


# Bad input


def save_draft(folder: Path, words: list[str], size: int) -> str:
    tokenizer = train_tokenizer(words, size)
    shape = ScratchConfig(hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=2)
    save_model(folder, create_model(shape, tokenizer, 0), tokenizer)
    optim = {"steps": 2, "learning_rate": 1e-3}
    return f"baselines.draft={json.dumps({'path': str(folder), 'optim': optim})}"


def test_draft_with_a_vocabulary_of_another_size(
    run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_draft(tmp_path / "other", ["count the pets", "list all students"], 300)
    message = fails(capsys, baselines.run, (*run.overrides, source), root=run.layout.root)
    assert message.startswith(f"error: baselines.draft.path {tmp_path / 'other'}: vocab_size is ")
    assert ", the teacher's is " in message


def test_draft_with_other_tokens(run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "other"
    shutil.copytree(run.layout.draft, folder)
    train_tokenizer(["count the pets", "list all students"], 300).save_pretrained(folder)
    source = f'baselines.draft={{"path": "{folder}", "optim": {{"steps": 2, "learning_rate": 1e-3}}}}'
    message = fails(capsys, baselines.run, (*run.overrides, source), root=run.layout.root)
    assert message == f"error: baselines.draft.path {folder}: its tokenizer has other tokens than the teacher's"


def test_missing_draft(run: FinishedRun, capsys: pytest.CaptureFixture[str]) -> None:
    source = 'baselines.draft={"path": "/no/such/model", "optim": {"steps": 2, "learning_rate": 1e-3}}'
    message = fails(capsys, baselines.run, (*run.overrides, source), root=run.layout.root)
    assert message.startswith("error: /no/such/model: no usable model configuration: ")


def test_missing_trajectories(pipeline: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    without = pipeline.copy(tmp_path / "run", "prompts", "teacher")
    message = fails(capsys, baselines.run, without.overrides, root=tmp_path)
    assert message == (
        f"error: {without.layout.trajectories}: no such output folder (trajectories expected); run jobs/collect.py"
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("baselines=null",), "baselines: recipe debug has neither a draft nor a medusa section"),
        (("baselines.medusa.heads=3",), "--set baselines.medusa.heads: unknown key 'heads'; known here: "),
        (("baselines.medusa.variant=3",), "--set: baselines.medusa.variant: Input should be 1 or 2"),
        (("baselines.draft.path=x",), "--set: baselines.draft: Value error, give exactly one of path and scratch"),
        (("baselines.medusa.teacher_learning_rate=1e-4",), "--set: baselines.medusa: Value error, teacher_learning_"),
        (("baselines.medusa.optim.optimizer=muon",), "--set: baselines.medusa: Value error, Medusa heads train with "),
        (
            ("baselines.draft.scratch.max_positions=100",),
            "--set: recipe: Value error, prompts.max_prompt_tokens=256 + collect.max_new_tokens=32 is more than "
            "baselines.draft.scratch.max_positions=100",
        ),
    ],
)
def test_recipe(
    pipeline: FinishedRun, capsys: pytest.CaptureFixture[str], overrides: tuple[str, ...], message: str
) -> None:
    found = fails(capsys, baselines.run, (*pipeline.overrides, *overrides), root=pipeline.layout.root)
    assert found.startswith(f"error: {message}")
