"""The distilled draft model: its loss token by token, a frozen teacher, agreement that grows, exact resumption."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cllm.training.checkpoint import full_model_state, load_checkpoint, save_checkpoint
from cllm.training.documents import Document
from cllm.training.draft import DraftObjective
from cllm.training.medusa import MedusaHeads, MedusaObjective
from cllm.training.packing import pack
from cllm.training.worker import Worker
from tests.fakes import PAD, tiny_model
from tests.training.baselines import answered, is_same, make_trainer, snapshot, train

STEPS = 3


def make_objective(divergence="forward_kl", **draft):
    return DraftObjective(
        tiny_model(**{"seed": 1, "layers": 1, "hidden": 16, "scale": 0.05} | draft), tiny_model(0), divergence
    )


def reference_losses(objective, document):
    """AR loss and KL(teacher || draft), one token at a time, with an unpacked forward for each prefix."""
    tokens, prompt = document.prompt_ids + document.response_ids, len(document.prompt_ids)
    ar = divergence = torch.zeros(())
    for place in range(prompt, len(tokens)):
        prefix = torch.tensor([tokens[:place]])
        teacher_V, draft_V = (model(prefix).logits[0, -1].softmax(-1) for model in (objective.teacher, objective.model))
        ar = ar - draft_V[tokens[place]].log()
        divergence = divergence + (teacher_V.detach() * (teacher_V.detach() / draft_V).log()).sum()
    return ar, divergence


def test_losses_and_gradients_equal_those_token_by_token():
    objective = make_objective(scale=0.3)
    documents = [Document((3, 4), (5, 6)), Document((7,), (8, 9, 10)), Document((13, 2, 3), (4,))]
    sums = objective(pack([documents[:2], documents[2:]], 16, PAD))
    expected = [sum(losses) for losses in zip(*(reference_losses(objective, d) for d in documents), strict=True)]
    torch.testing.assert_close(sums.ar, expected[0])
    torch.testing.assert_close(sums.second, expected[1], rtol=1e-4, atol=1e-5)
    trained = [p for p in objective.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in objective.model.parameters()}
    packed, slow = (torch.autograd.grad(loss, trained) for loss in (sums.second, expected[1]))
    for a, b in zip(packed, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_a_draft_equal_to_its_teacher_has_nothing_to_learn():
    model = tiny_model(0)
    rows = pack([answered(model)[:3]], 96, PAD)
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        sums = DraftObjective(tiny_model(0), model, divergence)(rows)
        torch.testing.assert_close(sums.second, torch.zeros(()), rtol=0, atol=1e-5)


def test_the_draft_comes_to_agree_with_a_teacher_that_does_not_change():
    documents = answered(tiny_model(0))
    trainer = make_trainer(make_objective(), documents, steps=150)
    teacher, start = snapshot(trainer.objective.teacher), agreement(trainer.objective, documents)
    train(trainer)
    assert is_same(trainer.objective.teacher, teacher)
    assert not trainer.objective.teacher.training
    learnt = agreement(trainer.objective, documents)
    assert learnt > 0.8
    assert learnt > start + 0.3


@torch.inference_mode()
def agreement(objective, documents):
    """How often teacher and draft find the same token likeliest: what greedy speculative decoding accepts."""
    hits = []
    for document in documents:
        tokens = torch.tensor([document.prompt_ids + document.response_ids])
        ours, theirs = (model(tokens).logits[0].argmax(-1) for model in (objective.model, objective.teacher))
        hits += (ours == theirs)[len(document.prompt_ids) - 1 : -1].tolist()
    return sum(hits) / len(hits)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resuming_repeats_the_uninterrupted_run_exactly(tmp_path, optimizer):
    documents = answered(tiny_model(0))
    whole, first, resumed = (make_trainer(make_objective(), documents, optimizer=optimizer) for _ in range(3))
    expected = [whole.train_step() for _ in range(9)]
    for _ in range(5):
        first.train_step()
    save_checkpoint(first, tmp_path)
    load_checkpoint(resumed, tmp_path)
    assert [resumed.train_step() for _ in range(4)] == expected[5:]
    assert is_same(resumed.objective, snapshot(whole.objective))


def objectives():
    """Each with what its AR loss weighs: a draft with its teacher, and both kinds of Medusa heads."""
    yield make_objective(), 0.5
    for variant in (1, 2):
        model = tiny_model(0)
        yield MedusaObjective(model, MedusaHeads.of(model, 2), variant=variant, decay=0.8, model_scale=0.5), 0.5


def train_sharded(rank, port, folder, documents):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    worker = Worker(device=torch.device("cpu"), rank=rank, world=2)
    results = []
    for number, ((objective, weight), (again, _)) in enumerate(zip(objectives(), objectives(), strict=True)):
        first = make_trainer(objective, documents, ar_weight=weight, worker=worker)
        losses = [first.train_step() for _ in range(STEPS)]
        save_checkpoint(first, folder / str(number))
        dist.barrier()
        resumed = make_trainer(again, documents, ar_weight=weight, worker=worker)
        load_checkpoint(resumed, folder / str(number))
        losses.append(resumed.train_step())
        results.append((losses, full_model_state(resumed)))
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.destroy_process_group()


def test_two_sharded_workers_equal_one(tmp_path):
    """Frozen models are sharded too, but are in no checkpoint."""
    documents = answered(tiny_model(0))
    for number in range(3):
        (tmp_path / str(number)).mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(train_sharded, (port, tmp_path, documents), nprocs=2)
    results = torch.load(tmp_path / "results.pt", weights_only=False)
    for (losses, state), (objective, weight) in zip(results, objectives(), strict=True):
        alone = make_trainer(objective, documents, ar_weight=weight)
        for loss in losses:
            expected = alone.train_step()
            assert loss.ar == pytest.approx(expected.ar, rel=1e-3)
            assert loss.second == pytest.approx(expected.second, rel=1e-3)
        whole = full_model_state(alone)
        assert state.keys() == whole.keys()
        for name, tensor in whole.items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-2, atol=1e-4)
