"""Two workers sharded by FSDP2 (gloo, CPU) take the same steps as one, and their checkpoint resumes and exports."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cllm.recipe import OptimConfig
from cllm.training.batches import RowStream
from cllm.training.checkpoint import full_model_state, load_checkpoint, save_checkpoint
from cllm.training.trainer import Trainer, Worker
from tests.fakes import PAD, tiny_model
from tests.training.test_trainer import Documents

STEPS = 4


def make_trainer(worker):
    config = OptimConfig(steps=20, learning_rate=3e-3, row_tokens=64, rows_per_step=4, accumulation=2)
    return Trainer(
        tiny_model(0, scale=0.02),
        RowStream(Documents(), config.row_tokens, seed=3),
        config,
        ar_weight=2.0,
        divergence="forward_kl",
        dtype=torch.float32,
        pad_id=PAD,
        worker=worker,
    )


def train(rank, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    worker = Worker(device=torch.device("cpu"), rank=rank, world=2)
    trainer = make_trainer(worker)
    losses = [trainer.train_step() for _ in range(STEPS)]
    save_checkpoint(trainer, folder)
    dist.barrier()
    resumed = make_trainer(worker)
    load_checkpoint(resumed, folder)
    losses.append(resumed.train_step())
    state = full_model_state(resumed)
    if rank == 0:
        torch.save((losses, state), folder / "result.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_sharded_workers_equal_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(train, (port, tmp_path), nprocs=2)
    losses, state = torch.load(tmp_path / "result.pt", weights_only=False)
    alone = make_trainer(Worker(device=torch.device("cpu")))
    for step, loss in enumerate(losses):
        expected = alone.train_step()
        assert loss.ar == pytest.approx(expected.ar, rel=1e-4), step
        assert loss.consistency == pytest.approx(expected.consistency, rel=1e-3, abs=1e-6), step
        assert loss.grad_norm == pytest.approx(expected.grad_norm, rel=1e-3), step
    for name, tensor in full_model_state(alone).items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-3, atol=1e-5)
