"""Collection and training go over two Ray nodes, one of which is killed in each: the results are those of one."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from tests.cluster.running import PATIENCE_S, attentive_cluster, wait_until
from tests.jobs.progress import saved_step, scalars
from tests.jobs.running import ROOT, FinishedRun, arguments

pytestmark = pytest.mark.ray


@dataclass(frozen=True, slots=True)
class Survived:
    """A run that lost a node while it collected and another while it trained.

    Attributes:
        parts: files of finished shards when the first node was killed, with their modification times.
        training_nodes: how many nodes the training workers were on.
        checkpoint_step: the last one that Ray Train knew of when the second node was killed.
    """

    run: FinishedRun
    parts: dict[str, int]
    training_nodes: int
    checkpoint_step: int


def parts(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("part-*.parquet")}


@contextmanager
def started(job: str, run: FinishedRun, address: str) -> Iterator[subprocess.Popen[bytes]]:
    """A job on the cluster, with a training worker on each of two CPUs. It must end well."""
    command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *arguments((*run.overrides, "resources.workers=2"))]
    environment = os.environ | {"RAY_ADDRESS": address, "PYTHONPATH": str(ROOT)}
    path = run.layout.root.parent / f"{job}.log"
    with path.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=path.parent)
    try:
        yield process
        assert process.wait(timeout=PATIENCE_S) == 0, path.read_text()[-4000:]
    finally:
        process.kill()
        process.wait()


def raylets_of(title: str) -> set[int]:
    """Parents of this process's descendants of that title: the nodes that these workers are on."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it may just have ended
            if " ".join(process.cmdline()).startswith(title):
                found.add(process.ppid())
    return found


def weights(folder: Path) -> torch.Tensor:
    """All of a model's, in the order of their names."""
    state = load_file(folder / "model.safetensors")
    return torch.cat([state[name].flatten() for name in sorted(state)])


@pytest.fixture(scope="module")
def survived(pipeline: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Survived:
    folder = tmp_path_factory.mktemp("nodes")
    run = pipeline.copy(folder / "run", "prompts", "teacher")
    partial = run.layout.root / "trajectories.partial"
    with attentive_cluster(nodes=2, cpus=1) as cluster:
        with started("collect", run, cluster.address):
            wait_until(lambda: bool(parts(partial)))
            cluster.kill_node(cluster.node_ids[0])
            when_killed = parts(partial)
            cluster.add_node()
        with started("train", run, cluster.address):
            wait_until(lambda: saved_step(run) > 0)
            nodes, step = raylets_of("ray::RayTrainWorker"), saved_step(run)
            cluster.kill_node(cluster.node_ids[0])
            cluster.add_node()
    return Survived(run, when_killed, len(nodes), step)


def test_the_first_node_died_in_the_middle_of_collection(survived: Survived) -> None:
    assert 0 < len(survived.parts) < 12
    now = parts(survived.run.layout.trajectories)
    assert len(now) == 12
    assert {name: now[name] for name in survived.parts} == survived.parts, "finished shards were collected again"


def test_collected_rows_are_those_of_one_machine(survived: Survived, pipeline: FinishedRun) -> None:
    for left in pipeline.layout.trajectories.glob("part-*.parquet"):
        right = survived.run.layout.trajectories / left.name
        assert pq.read_table(left).equals(pq.read_table(right), check_metadata=True), left.name


def test_training_ran_on_both_nodes_and_went_on_behind_the_checkpoint(survived: Survived) -> None:
    assert survived.training_nodes == 2
    first, second = scalars(survived.run)
    steps = survived.run.recipe.train.optim.steps
    assert max(step for _, step in first) < steps
    resumed_behind = min(step for _, step in second) - 1
    assert resumed_behind >= survived.checkpoint_step > 0
    assert max(step for _, step in second) == steps


def test_losses_and_weights_are_those_of_one_worker(survived: Survived, pipeline: FinishedRun) -> None:
    """But for rounding, which is that of bfloat16 where the CPU multiplies it: two workers add the same sums otherwise.

    The one row to validate on is none for two workers.
    """
    (alone,) = scalars(pipeline)
    first, second = scalars(survived.run)
    assert first | second == pytest.approx({key: alone[key] for key in alone if "validation" not in key[0]}, rel=1e-2)
    found, wanted = weights(survived.run.layout.student), weights(pipeline.layout.student)
    assert (found - wanted).norm() < 0.1 * (wanted - weights(pipeline.layout.finetuned)).norm()
