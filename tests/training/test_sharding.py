"""Two workers sharded by FSDP2 (gloo, CPU) take the same steps as one, and their checkpoint resumes and exports."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cllm.training.checkpoint import full_model_state, load_checkpoint, save_checkpoint
from cllm.training.worker import Worker
from tests.training.test_trainer import make_trainer

STEPS = 4


def train(rank, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    worker = Worker(device=torch.device("cpu"), rank=rank, world=2)
    trainer = make_trainer(worker, accumulation=2)
    losses = [trainer.train_step() for _ in range(STEPS)]
    save_checkpoint(trainer, folder)
    dist.barrier()
    resumed = make_trainer(worker, accumulation=2)
    load_checkpoint(resumed, folder)
    losses.append(resumed.train_step())
    state = full_model_state(resumed)
    if rank == 0:
        torch.save((losses, state), folder / "result.pt")
    dist.destroy_process_group()


def test_two_sharded_workers_equal_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(train, (port, tmp_path), nprocs=2)
    losses, state = torch.load(tmp_path / "result.pt", weights_only=False)
    alone = make_trainer()
    for step, loss in enumerate(losses):
        expected = alone.train_step()
        assert loss.ar == pytest.approx(expected.ar, rel=1e-4), step
        assert loss.consistency == pytest.approx(expected.consistency, rel=1e-3, abs=1e-6), step
        assert loss.grad_norm == pytest.approx(expected.grad_norm, rel=1e-3), step
    for name, tensor in full_model_state(alone).items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-3, atol=1e-5)
