"""Sessions from recipes, on the run of a tiny teacher: what they train on, that they repeat exactly, their exports."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM, PreTrainedModel

from cllm.errors import InputError
from cllm.layout import RunLayout
from cllm.recipe import Recipe
from cllm.training.baselines import draft_session, medusa_session
from cllm.training.checkpoint import full_model_state, load_checkpoint, save_checkpoint
from cllm.training.session import Session, distill_session, finetune_session, read_trajectories
from cllm.training.trainer import StepLosses
from cllm.training.worker import Worker
from tests.training.made import make_collected_run

CPU = Worker(device=torch.device("cpu"))
LORA = 'train.lora={"rank": 4, "alpha": 8, "dropout": 0.3}'
SIZES = ("finetune.optim.steps=6", "train.optim.steps=6", "train.optim.learning_rate=1e-2")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """No test changes it."""
    return make_collected_run(tmp_path_factory.mktemp("session") / "run", SIZES)


def steps(session: Session, count: int) -> list[StepLosses]:
    return [session.trainer.train_step() for _ in range(count)]


def exported(session: Session, folder: Path) -> dict[str, torch.Tensor]:
    folder.mkdir()
    session.export(folder, full_model_state(session.trainer))
    return load_file(folder / "model.safetensors")


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(2, 40)[None]).logits


# What is trained on


def prompts_of(session: Session) -> tuple[set[tuple[int, ...]], set[tuple[int, ...]]]:
    """Responses that are trained and validated on."""
    rows = session.trainer.stream.epoch_rows(0)
    trained = {document.response_ids for row in rows for document in row}
    return trained, {document.response_ids for row in session.validation for document in row}


@pytest.mark.parametrize("validate_every", ["3", "null"])
def test_the_cllm_and_the_baselines_learn_and_validate_on_the_same(run, validate_every):
    keys = ("train", "baselines.draft", "baselines.medusa")
    recipe = run.with_overrides([f"{key}.validate_every={validate_every}" for key in keys])
    found = [prompts_of(make(recipe, CPU)) for make in (distill_session, draft_session, medusa_session)]
    assert found[0] == found[1] == found[2]
    trained, validated = found[0]
    assert len(validated) == 2  # 3% of 80
    assert len(trained) == 78
    assert not trained & validated


@pytest.mark.parametrize(("every", "due"), [("2", [2, 4, 6]), ("null", [6])])
def test_validation_is_due_every_so_many_steps_and_at_the_end(run, every, due):
    session = distill_session(run.with_overrides([f"train.validate_every={every}"]), CPU)
    found = []
    for step in range(1, 7):
        session.trainer.step = step
        found += [step] if session.is_validation_due else []
    assert found == due


def test_patience_needs_something_to_validate_on(tmp_path):
    recipe = make_collected_run(tmp_path / "run", ("train.validate_every=2", "train.patience=1"), num_rows=10)
    with pytest.raises(InputError, match=r"train\.patience: 10 trajectories are too few"):
        distill_session(recipe, CPU)


def test_reference_labels_reach_the_session(run):
    rows = list(
        distill_session(run.with_overrides(["train.loss.ar_labels=reference"]), CPU).trainer.stream.epoch_rows(0)
    )
    documents = [document for row in rows for document in row]
    answers = {row.response_ids[::-1] for row in read_trajectories(run)[2:]}  # as the run's prompts have them
    assert {document.response_ids for document in documents if document.learn_response} == answers
    assert sum(not document.learn_response for document in documents) == 78


# Exact repetition and resumption


@pytest.mark.parametrize("overrides", [(), (LORA,)], ids=["all weights", "adapters"])
def test_two_runs_of_one_recipe_are_the_same(run, tmp_path, overrides):
    recipe, states = run.with_overrides(overrides), []
    for number in range(2):
        torch.manual_seed(number)  # whatever happened before in the process
        session = distill_session(recipe, CPU)
        torch.rand(number)
        steps(session, 6)
        states.append(exported(session, tmp_path / str(number)))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    other = distill_session(recipe.with_overrides(["seed=0"]), CPU, seed=1)
    assert steps(other, 1) != steps(distill_session(recipe, CPU), 1)


def test_dropout_goes_on_where_it_was(run, tmp_path):
    recipe = run.with_overrides([LORA])
    whole, first = distill_session(recipe, CPU), distill_session(recipe, CPU)
    expected = steps(whole, 6)
    steps(first, 3)
    save_checkpoint(first.trainer, tmp_path)
    torch.manual_seed(123)
    resumed = distill_session(recipe, CPU)
    load_checkpoint(resumed.trainer, tmp_path)
    assert steps(resumed, 3) == expected[3:]
    without = distill_session(run.with_overrides([LORA.replace("0.3", "0")]), CPU)
    assert steps(without, 6)[1:] != expected[1:]  # there is dropout


# Adapters


def test_adapters_alone_are_trained_and_saved(run, tmp_path):
    session = distill_session(run.with_overrides([LORA]), CPU)
    before = {name: tensor.clone() for name, tensor in session.trainer.model.state_dict().items()}
    steps(session, 4)
    for name, tensor in session.trainer.model.state_dict().items():
        assert torch.equal(tensor, before[name]) == ("lora_" not in name), name
    save_checkpoint(session.trainer, tmp_path)
    saved = FileSystemReader(tmp_path).read_metadata().state_dict_metadata
    weights = {key for key in saved if key.startswith("model.")}
    adapters = {key for key in weights if "lora_" in key}
    assert len(adapters) == sum(p.requires_grad for p in session.trainer.model.parameters())
    assert weights - adapters <= {"model.model.lm_head.weight"}  # tied: torch takes it for a second, unfrozen weight


def test_exported_adapters_are_merged_into_a_plain_checkpoint(run, tmp_path):
    session = distill_session(run.with_overrides([LORA]), CPU)
    steps(session, 4)
    adapted = logits(session.trainer.objective.model)
    exported(session, tmp_path / "student")
    assert not (tmp_path / "student" / "adapter_config.json").exists()
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not any(report.values())  # no weight is missing or left over
    torch.testing.assert_close(logits(model), adapted, rtol=1e-3, atol=1e-3)
    teacher = AutoModelForCausalLM.from_pretrained(RunLayout.of(run).finetuned)
    assert (logits(teacher) - adapted).abs().max() > 1e-2


def test_a_teacher_from_a_checkpoint_can_learn_by_adapters(run, tmp_path):
    path = RunLayout.of(run).finetuned
    teacher = f'teacher={{"path": "{path}"}}'
    lora = ("finetune.gradient_checkpointing=true", LORA.replace("train", "finetune").replace("0.3", "0"))
    session = finetune_session(run.with_overrides([teacher, *lora]), CPU)
    assert session.trainer.model.is_gradient_checkpointing
    steps(session, 4)
    weights, before = exported(session, tmp_path / "teacher"), load_file(path / "model.safetensors")
    assert weights.keys() == before.keys()
    changed = {name for name, tensor in weights.items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in weights if name.split(".")[-2].endswith("_proj")}


# Export


def test_the_student_is_exported_as_it_was_trained(run, tmp_path):
    session = distill_session(run, CPU)
    steps(session, 2)
    weights = exported(session, tmp_path / "student")
    for name, tensor in session.trainer.model.state_dict().items():
        assert name not in weights or torch.equal(weights[name], tensor), name
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    torch.testing.assert_close(logits(model), logits(session.trainer.objective.model))
