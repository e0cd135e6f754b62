"""The optimiser step: accumulation changes nothing, losses fall, and a resumed run is the uninterrupted one."""

from itertools import pairwise

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from cllm.decoding.trajectories import Trajectory
from cllm.errors import InputError
from cllm.recipe import OptimConfig
from cllm.training.batches import RowStream
from cllm.training.checkpoint import full_model_state, load_checkpoint, save_checkpoint
from cllm.training.documents import Document, Span
from cllm.training.feed import StepFeed
from cllm.training.forward import PackedObjective, packed_losses
from cllm.training.optim import learning_rate_at
from cllm.training.packing import pack
from cllm.training.session import hold_out
from cllm.training.trainer import Trainer, compile_decoder_layers
from cllm.training.worker import Worker
from tests.fakes import EOS, PAD, tiny_model


class Documents:
    """Responses that repeat their prompt's last token, with other spans in every epoch."""

    def documents(self, epoch):
        return [
            Document(
                (2 + i % 5, 7 + i % 11), (7 + i % 11,) * (3 + i % 4) + (EOS,), (Span(1, (2 + (i + epoch) % 9, 3)),)
            )
            for i in range(40)
        ]


def make_trainer(worker=Worker(device=torch.device("cpu")), compile_layers=False, **changes):  # noqa: B008 (it is frozen)
    config = OptimConfig(**{"steps": 40, "learning_rate": 3e-3, "row_tokens": 64, "rows_per_step": 4} | changes)
    return Trainer(
        PackedObjective(tiny_model(0, scale=0.02), "forward_kl"),
        RowStream(Documents(), config.row_tokens, seed=3),
        config,
        ar_weight=2.0,
        dtype=torch.float32,
        pad_id=PAD,
        worker=worker,
        compile_layers=compile_layers,
    )


def test_losses_fall():
    trainer = make_trainer()
    losses = [trainer.train_step() for _ in range(40)]
    assert losses[-1].ar < 0.6 * losses[0].ar
    assert trainer.step == 40


def test_muon_covers_every_parameter_once_and_learns():
    trainer = make_trainer(optimizer="muon")
    held = [id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in trainer.model.parameters())
    losses = [trainer.train_step() for _ in range(30)]
    assert losses[-1].ar < 0.6 * losses[0].ar


def test_rows_that_do_not_divide_are_named():
    with pytest.raises(InputError, match="rows_per_step: 4 is no multiple of workers x accumulation, 3"):
        make_trainer(accumulation=3)


def test_accumulation_gives_the_same_steps():
    whole, parts = make_trainer(), make_trainer(accumulation=4)
    for _ in range(5):
        a, b = whole.train_step(), parts.train_step()
        assert a.ar == pytest.approx(b.ar, rel=1e-5)
        assert a.second == pytest.approx(b.second, rel=1e-4, abs=1e-7)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)


@pytest.mark.slow  # the compiler needs up to a minute, whatever the number of layers
def test_compiled_layers_take_the_same_steps():
    eager, compiled = make_trainer(), make_trainer(compile_layers=True)
    for _ in range(3):
        a, b = eager.train_step(), compiled.train_step()
        assert b.ar == pytest.approx(a.ar, rel=1e-5)
        assert b.second == pytest.approx(a.second, rel=1e-4, abs=1e-7)
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-4)
    state = full_model_state(compiled)
    for name, tensor in full_model_state(eager).items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_layers_are_compiled_once_for_all_of_them_and_every_mask(attention):
    torch.compiler.reset()
    eager, compiled = tiny_model(0, layers=3), tiny_model(0, layers=3)
    compiled.set_attn_implementation(attention)
    counter = CompileCounter()
    compile_decoder_layers(compiled, backend=counter)
    stream = RowStream(Documents(), 128, seed=3)
    for _ in range(4):
        rows = pack(stream.take(2), 128, PAD)
        with torch.no_grad():  # FlexAttention has no gradient on the CPU
            a, b = (packed_losses(model, rows, "forward_kl") for model in (eager, compiled))
        torch.testing.assert_close(b.ar, a.ar)
        torch.testing.assert_close(b.second, a.second, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


def test_a_step_ahead_is_prepared_and_does_not_count():
    stream = RowStream(Documents(), 64, seed=3)
    config = OptimConfig(steps=40, learning_rate=3e-3, row_tokens=64, rows_per_step=4)
    feed = StepFeed(stream, config, PAD, Worker(device=torch.device("cpu")))
    feed.take()
    state = feed.state
    feed.prepare()
    assert stream.state != state
    assert feed.state == state
    ahead = feed.take()
    assert feed.state == stream.state
    feed.restore(state)
    again = feed.take()
    assert [part[0] for part in again.parts] == [part[0] for part in ahead.parts]


def test_the_last_step_prepares_no_other():
    trainer = make_trainer(steps=2)
    trainer.train_step()
    assert trainer.feed.state != trainer.stream.state
    trainer.train_step()
    assert trainer.feed.state == trainer.stream.state


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resuming_repeats_the_uninterrupted_run_exactly(tmp_path, optimizer):
    whole, first, resumed = (make_trainer(optimizer=optimizer) for _ in range(3))
    expected = [whole.train_step() for _ in range(25)]
    for _ in range(13):  # in the middle of an epoch
        first.train_step()
    save_checkpoint(first, tmp_path)
    load_checkpoint(resumed, tmp_path)
    assert [resumed.train_step() for _ in range(12)] == expected[13:]
    for name, tensor in full_model_state(whole).items():
        assert torch.equal(tensor, full_model_state(resumed)[name]), name


def test_a_damaged_checkpoint_is_refused(tmp_path):
    save_checkpoint(make_trainer(), tmp_path)
    next(tmp_path.glob("*.distcp")).write_bytes(b"half")
    with pytest.raises(InputError, match="not a usable training checkpoint"):
        load_checkpoint(make_trainer(), tmp_path)


def test_diverging_training_stops_before_the_update():
    trainer = make_trainer()
    with torch.no_grad():
        trainer.model.lm_head.weight.fill_(float("nan"))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(InputError, match=r"step 0: gradient norm nan; lower optim\.learning_rate"):
        trainer.train_step()
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, before[name]) or name == "lm_head.weight", name


def test_schedule_warms_up_and_ends_at_its_floor():
    config = OptimConfig(steps=100, learning_rate=1.0, warmup_ratio=0.1, min_learning_rate_ratio=0.1)
    rates = [learning_rate_at(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) in (9, 10)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)
    assert all(a >= b for a, b in pairwise(rates[10:]))


@pytest.mark.parametrize(("responses", "held_out"), [(1, 3), (2, 4), (4, 4), (30, 30)])
def test_all_responses_to_a_prompt_are_held_out_together(responses, held_out):
    """3% of 100 rows; the prompt on the border comes along."""
    rows = [Trajectory(f"{i // responses:016x}", (5,), (6 + i,), "stop", ()) for i in range(100)]
    validation, train = hold_out(rows)
    assert len(validation) == held_out
    assert [*validation, *train] == rows
    assert not {row.prompt_id for row in validation} & {row.prompt_id for row in train}


def test_too_few_rows_are_all_trained_on():
    rows = [Trajectory(f"{i:016x}", (5,), (6,), "stop", ()) for i in range(16)]
    assert hold_out(rows) == ([], rows)


def test_gradient_checkpointing_computes_layers_twice_and_the_same_gradient():
    plain, saving = make_trainer(), make_trainer()
    saving.model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = {"plain": 0, "saving": 0}
    for name, trainer in (("plain", plain), ("saving", saving)):
        attention = trainer.model.base_model.layers[0].self_attn
        attention.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    for _ in range(3):
        assert saving.train_step() == plain.train_step()
    assert calls == {"plain": 3, "saving": 6}
