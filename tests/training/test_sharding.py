"""Two workers sharded by FSDP2 (gloo, CPU) take the same steps as one, from weights that only one of them has read, and
save, resume and export them."""

import socket
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cllm.layout import RunLayout, teacher_path
from cllm.recipe import Recipe
from cllm.training.baselines import medusa_session
from cllm.training.checkpoint import full_model_state, load_checkpoint, save_checkpoint
from cllm.training.early_stopping import EarlyStopping
from cllm.training.forward import PackedObjective
from cllm.training.session import Session, distill_session, load_for
from cllm.training.sharding import shard
from cllm.training.throughput import training_flops
from cllm.training.worker import Worker
from tests.fakes import tiny_model
from tests.training.made import make_collected_run
from tests.training.test_trainer import make_trainer

STEPS = 4
ALONE = Worker(device=torch.device("cpu"))
KINDS = {
    "plain": (),
    "adapters": ('train.lora={"rank": 4, "alpha": 8}', "train.gradient_checkpointing=true"),
    "medusa": ("baselines.medusa.variant=2",),
}


class LiveBytes(TorchDispatchMode):
    """How much memory the tensors made inside it take at most at a time, those on the meta device left out."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, DTensor) and tensor.device.type != "meta":
                self._note(tensor.untyped_storage())
        return made

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def session_of(kind: str, run: Recipe, worker: Worker) -> Session:
    make = medusa_session if kind == "medusa" else distill_session
    return make(run.with_overrides(KINDS[kind]), worker)


def work(rank: int, port: int, run: Recipe, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    worker = Worker(device=torch.device("cpu"), rank=rank, world=2)
    found = {"steps": steps(worker, folder), "loading": loading(worker, run), "best": best(worker, folder)}
    found |= {kind: exports(kind, worker, run, folder) for kind in KINDS}
    torch.save(found, folder / f"found-{rank}.pt")
    dist.destroy_process_group()


def steps(worker: Worker, folder: Path) -> Any:
    """Losses of some steps, the last of which a resumed trainer takes, and its weights."""
    trainer = make_trainer(worker, accumulation=2)
    losses = [trainer.train_step() for _ in range(STEPS)]
    save_checkpoint(trainer, folder / "steps")
    dist.barrier()
    resumed = make_trainer(worker, accumulation=2)
    load_checkpoint(resumed, folder / "steps")
    losses.append(resumed.train_step())
    return losses, full_model_state(resumed), training_flops(resumed.objective)


def best(worker: Worker, folder: Path) -> Any:
    """Weights after the first step; and those of a trainer that resumed later and was given its best ones back."""
    trainer, stopping = make_trainer(worker), EarlyStopping(3)
    for loss in (1.0, 2.0):
        trainer.train_step()
        stopping.note(loss, trainer.step, trainer.objective)
        if loss == 1.0:
            first = full_model_state(trainer)
    save_checkpoint(trainer, folder / "best", stopping)
    dist.barrier()
    resumed, again = make_trainer(worker), EarlyStopping(3)
    load_checkpoint(resumed, folder / "best", again)
    last = full_model_state(resumed)
    again.restore_best(resumed.objective)
    return again.progress, first, last, full_model_state(resumed)


def loading(worker: Worker, run: Recipe) -> Any:
    """Where the weights are before sharding, what they are behind it, and what a deep model takes on its way."""
    places = {parameter.device.type for parameter in load_for(worker, teacher_path(run), None).parameters()}
    session = session_of("plain", run, worker)
    local = sum(p.to_local().numel() for p in session.trainer.model.parameters() if isinstance(p, DTensor))
    deep = tiny_model(0, layers=16).to("cpu" if worker.rank == 0 else "meta")
    deep.tie_weights()
    with LiveBytes() as memory:
        shard(PackedObjective(deep, "forward_kl"), torch.float32, worker)
    return places, full_model_state(session.trainer), local, memory.peak


def exports(kind: str, worker: Worker, run: Recipe, folder: Path) -> Any:
    session = session_of(kind, run, worker)
    losses = [session.trainer.train_step() for _ in range(STEPS)]
    losses.append(session.trainer.validate(session.validation))
    state = full_model_state(session.trainer)
    if worker.rank == 0:
        (folder / kind).mkdir()
        session.export(folder / kind, state)
    return losses


@dataclass(frozen=True)
class Found:
    folder: Path
    run: Recipe
    ranks: tuple[dict[str, Any], ...]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What two workers say of themselves."""
    folder = tmp_path_factory.mktemp("sharding")
    settings = ("optim.row_tokens=96", "optim.rows_per_step=4", "precision=fp32")
    overrides = [f"{section}.{setting}" for section in ("train", "baselines.medusa") for setting in settings]
    run = make_collected_run(folder / "run", tuple(overrides), num_rows=240)
    for name in ("steps", "best"):
        (folder / name).mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(work, (port, run, folder), nprocs=2)
    return Found(folder, run, tuple(torch.load(folder / f"found-{rank}.pt", weights_only=False) for rank in (0, 1)))


def test_two_sharded_workers_equal_one(found: Found) -> None:
    losses, state, _ = found.ranks[0]["steps"]
    alone = make_trainer()
    for step, loss in enumerate(losses):
        expected = alone.train_step()
        assert loss.ar == pytest.approx(expected.ar, rel=1e-4), step
        assert loss.second == pytest.approx(expected.second, rel=1e-3, abs=1e-6), step
        assert loss.grad_norm == pytest.approx(expected.grad_norm, rel=1e-3), step
    for name, tensor in full_model_state(alone).items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-3, atol=1e-5)


def test_one_worker_reads_the_weights_and_all_have_them(found: Found) -> None:
    (places, state, *_), (elsewhere, nothing, *_) = (rank["loading"] for rank in found.ranks)
    assert (places, elsewhere) == ({"cpu"}, {"meta"})
    teacher = load_file(RunLayout.of(found.run).finetuned / "model.safetensors")
    assert teacher.keys() <= state.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in teacher.items())
    assert not nothing  # the whole is gathered on the first one only


def test_no_worker_holds_the_whole_model(found: Found) -> None:
    whole = sum(p.numel() for p in session_of("plain", found.run, ALONE).trainer.model.parameters())
    parts = [rank["loading"][2] for rank in found.ranks]
    assert sum(parts) == pytest.approx(whole, rel=0.05)  # small tensors are padded
    assert max(parts) < 0.6 * whole
    deep = tiny_model(0, layers=16)
    layer = 4 * sum(p.numel() for p in deep.base_model.layers[0].parameters())
    whole_bytes = 4 * deep.num_parameters()
    for rank in found.ranks:
        assert rank["loading"][3] < 0.5 * whole_bytes + 4 * layer < 0.8 * whole_bytes


def test_flops_are_those_of_the_whole_model(found: Found) -> None:
    """Whatever its shards: one worker counts all of a token's, and MFU divides by the peak of all."""
    expected = training_flops(make_trainer().objective)
    assert [rank["steps"][2] for rank in found.ranks] == [expected, expected]


def test_the_best_weights_survive_a_checkpoint(found: Found) -> None:
    progress, first, last, restored = found.ranks[0]["best"]
    assert progress == {"loss": 1.0, "step": 1, "stale": 1}
    assert all(torch.equal(restored[name], tensor) for name, tensor in first.items())
    assert any(not torch.equal(last[name], tensor) for name, tensor in first.items())


@pytest.mark.parametrize("kind", KINDS)
def test_exports_of_two_workers_are_those_of_one(found: Found, tmp_path: Path, kind: str) -> None:
    session = session_of(kind, found.run, ALONE)
    alone = [session.trainer.train_step() for _ in range(STEPS)]
    assert len(session.validation) >= 2
    validated = session.trainer.validate(session.validation[: len(session.validation) // 2 * 2])
    session.export(tmp_path, full_model_state(session.trainer))
    *losses, validated_by_two = found.ranks[0][kind]
    for ours, expected in zip(losses, alone, strict=True):
        assert ours.ar == pytest.approx(expected.ar, rel=1e-3)
        assert ours.second == pytest.approx(expected.second, rel=2e-3)
    assert validated_by_two == pytest.approx(validated, rel=1e-3)
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.safetensors"))
    assert len(files) == (2 if kind == "medusa" else 1)
    for file in files:
        theirs = load_file(found.folder / kind / file)
        for name, tensor in load_file(tmp_path / file).items():
            torch.testing.assert_close(theirs.pop(name), tensor, rtol=1e-3, atol=2e-4)
        assert not theirs
