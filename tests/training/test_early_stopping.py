"""Training that overfits ends where it should, with its best weights; a run that was killed ends at the same place."""

import math
import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from cllm.recipe import OptimConfig
from cllm.training.batches import RowStream
from cllm.training.checkpoint import load_checkpoint, save_checkpoint
from cllm.training.documents import Document, Span
from cllm.training.early_stopping import EarlyStopping
from cllm.training.forward import PackedObjective
from cllm.training.loop import run
from cllm.training.session import Session
from cllm.training.trainer import StepLosses, Trainer
from cllm.training.worker import Worker
from tests.fakes import PAD, tiny_model
from tests.training.baselines import Fixed, is_same, snapshot

EVERY, STEPS = 3, 60


def noise(seed: int) -> list[Document]:
    """Responses out of half of the vocabulary, in no order: there is little to learn, and much to memorise."""
    rng = random.Random(seed)
    return [
        Document((rng.randrange(2, 24),), tuple(rng.choices(range(2, 12), k=6)), (Span(1, (PAD, PAD, PAD)),))
        for _ in range(12)
    ]


def make_session(patience: int | None, documents: list[Document] | None = None) -> Session:
    config = OptimConfig(
        steps=STEPS, learning_rate=1e-2, row_tokens=64, rows_per_step=2, checkpoint_every=4, log_every=10
    )
    trainer = Trainer(
        PackedObjective(tiny_model(0, scale=0.02), "forward_kl"),
        RowStream(Fixed(documents or noise(0)), 64, seed=1),
        config,
        ar_weight=2.0,
        dtype=torch.float32,
        pad_id=PAD,
        worker=Worker(device=torch.device("cpu")),
    )
    validation = list(RowStream(Fixed(noise(1)), 64, seed=1).epoch_rows(0))
    stopping = None if patience is None else EarlyStopping(patience)
    tokenizer = None  # nothing is exported
    return Session(trainer, validation, EVERY, stopping, tokenizer)  # type: ignore[arg-type]


class KilledError(Exception):
    """Stands for a process that is gone."""


@dataclass
class Recorder:
    """Notes what it is told, and the weights at each validation; keeps checkpoints, and ends the run at a step."""

    session: Session
    folder: Path | None = None
    kill_at: int = -1
    losses: dict[int, StepLosses] = field(default_factory=dict)
    validations: dict[int, float] = field(default_factory=dict)
    weights: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        return self.session.trainer.step

    def note(self, losses: StepLosses) -> None:
        self.losses[self.step] = losses
        if self.step == self.kill_at:
            raise KilledError

    def validated(self, ar: float, second: float) -> None:
        self.validations[self.step] = 2.0 * ar + second
        self.weights[self.step] = snapshot(self.session.trainer.objective)

    def tell(self, text: str) -> None:
        self.told.append(text)

    def checkpoint(self) -> None:
        if self.folder is not None:
            place = self.folder / f"{self.step:03d}"
            place.mkdir()
            save_checkpoint(self.session.trainer, place, self.session.stopping)


def trained(patience: int | None) -> Recorder:
    recorder = Recorder(make_session(patience))
    run(recorder.session, recorder)
    return recorder


def test_training_ends_after_so_many_validations_without_a_better_one():
    recorder = trained(patience=4)
    best = min(recorder.validations, key=lambda step: recorder.validations[step])
    assert best > EVERY  # it first got better
    assert max(recorder.validations) == recorder.step == best + 4 * EVERY < STEPS
    assert recorder.told == [f"no validation was better than that of step {best}: stopped"]


def test_the_best_weights_are_left():
    recorder = trained(patience=4)
    objective, stopping = recorder.session.trainer.objective, recorder.session.stopping
    assert stopping is not None
    assert is_same(objective, recorder.weights[stopping.best_step])
    assert not is_same(objective, recorder.weights[recorder.step])


def test_the_best_weights_are_left_even_where_all_steps_are_taken():
    recorder = trained(patience=1000)
    best = min(recorder.validations, key=lambda step: recorder.validations[step])
    assert recorder.step == STEPS
    assert best < STEPS
    assert is_same(recorder.session.trainer.objective, recorder.weights[best])


def test_without_patience_the_last_weights_are_left():
    recorder = trained(patience=None)
    assert recorder.step == max(recorder.validations) == STEPS
    assert is_same(recorder.session.trainer.objective, recorder.weights[STEPS])
    assert recorder.told == []


@pytest.mark.parametrize("killed", ["early", "at the best", "while stale", "at the end"])
def test_a_killed_run_ends_as_the_uninterrupted_one(tmp_path, killed):
    whole = trained(patience=4)
    best = whole.session.stopping.best_step
    first = Recorder(make_session(4), tmp_path)
    first.kill_at = {"early": 6, "at the best": best + 1, "while stale": best + 5, "at the end": whole.step}[killed]
    with pytest.raises(KilledError):
        run(first.session, first)
    resumed = Recorder(make_session(4), tmp_path)
    load_checkpoint(resumed.session.trainer, max(tmp_path.iterdir()), resumed.session.stopping)
    assert 0 < resumed.step <= first.kill_at
    run(resumed.session, resumed)
    assert resumed.step == whole.step
    assert resumed.session.stopping.progress == whole.session.stopping.progress
    assert is_same(resumed.session.trainer.objective, snapshot(whole.session.trainer.objective))
    for step, losses in resumed.losses.items():
        assert losses == whole.losses[step]


def test_a_checkpoint_of_a_run_that_has_ended_ends_at_once(tmp_path):
    whole = Recorder(make_session(4), tmp_path)
    run(whole.session, whole)
    whole.session.trainer.model.lm_head.weight.data.zero_()  # the best weights come from the checkpoint alone
    save_checkpoint(whole.session.trainer, tmp_path, whole.session.stopping)
    resumed = Recorder(make_session(4))
    load_checkpoint(resumed.session.trainer, tmp_path, resumed.session.stopping)
    run(resumed.session, resumed)
    assert not resumed.losses
    assert is_same(resumed.session.trainer.objective, whole.weights[whole.session.stopping.best_step])


def test_long_documents_are_told_of_once():
    session = make_session(None, [*noise(0), Document((2,), (3,) * 80)])
    recorder = Recorder(session)
    run(session, recorder)
    assert recorder.told == ["warning: documents of more than 64 tokens are left out"]


def test_a_loss_that_is_no_number_is_never_the_best():
    stopping, model = EarlyStopping(2), tiny_model(0)
    stopping.note(math.nan, 1, model)
    assert (stopping.ended, stopping.weights) == (False, {})
    stopping.restore_best(model)  # there is none: nothing changes
    stopping.note(5.0, 2, model)
    stopping.note(5.0, 3, model)
    assert not stopping.ended
    stopping.note(math.nan, 4, model)
    assert stopping.ended
    assert (stopping.best_loss, stopping.best_step) == (5.0, 2)


@pytest.mark.parametrize("losses", [(), (math.nan,), (math.nan, 5.0, 6.0)])
def test_checkpoints_hold_what_was_noted(tmp_path, losses):
    trainer, stopping = make_session(None).trainer, EarlyStopping(9)
    for step, loss in enumerate(losses, 1):
        stopping.note(loss, step, trainer.objective)
    save_checkpoint(trainer, tmp_path, stopping)
    resumed = EarlyStopping(9)
    load_checkpoint(make_session(None).trainer, tmp_path, resumed)
    assert resumed.progress == stopping.progress
    assert resumed.weights.keys() == stopping.weights.keys()
    load_checkpoint(make_session(None).trainer, tmp_path)  # without patience nothing of it is read


def test_kept_weights_do_not_change_with_the_model():
    stopping, model = EarlyStopping(1), tiny_model(0)
    before = snapshot(model)
    stopping.note(1.0, 1, model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    stopping.restore_best(model)
    assert is_same(model, before)
