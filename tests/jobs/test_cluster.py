"""What jobs ask of a cluster: they wait for one that has too little, but not for ever; pools are as large as it is."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from jobs.cli import EXIT_BAD_INPUT
from tests.jobs.running import PATIENCE_S, ROOT, arguments, run_job

pytestmark = pytest.mark.ray
OBJECT_STORE_BYTES = 100 << 20


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """One node, without GPUs."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": OBJECT_STORE_BYTES})
    yield started
    started.shutdown()


def test_a_cluster_that_does_not_grow_is_one_line_after_a_while(cluster: Cluster, tmp_path: Path) -> None:
    overrides = (f"output={tmp_path / 'run'}", "resources.gpus=2", "resources.wait_s=1")
    done = run_job("prepare", overrides, cwd=tmp_path, RAY_ADDRESS=cluster.address)
    assert done.returncode == EXIT_BAD_INPUT
    shortage = "resources.gpus: the recipe needs 2 GPUs, the cluster has 0"
    lines = done.stderr.splitlines()
    assert f"warning: {shortage}; waiting up to 1 s for it to grow (resources.wait_s)" in lines
    assert lines[-1] == f"error: {shortage}, and has not grown within 1 s (resources.wait_s)"
    assert not any(tmp_path.iterdir())


def test_a_cluster_that_grows_is_waited_for(cluster: Cluster, tmp_path: Path) -> None:
    overrides = (f"output={tmp_path / 'run'}", "resources.gpus=1", f"resources.wait_s={PATIENCE_S}")
    command = [sys.executable, str(ROOT / "jobs" / "prepare.py"), *arguments(overrides)]
    environment = os.environ | {"RAY_ADDRESS": str(cluster.address), "PYTHONPATH": str(ROOT)}
    log = tmp_path / "log"
    with log.open("w") as output:
        job = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while "waiting up to" not in log.read_text():
            assert job.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert not (tmp_path / "run").exists()
        cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=OBJECT_STORE_BYTES)
        assert job.wait(timeout=PATIENCE_S) == 0, log.read_text()
    finally:
        job.kill()
        job.wait()
    assert (tmp_path / "run" / "prompts" / "manifest.json").exists()


def test_pools_have_the_size_of_the_cluster() -> None:
    """Four GPUs and no CPU, as far as Ray knows: a head node of a cluster that has still to start its CPU nodes."""
    program = """
import ray
from cllm.recipes import get_recipe
from jobs.pool import actor_pool

ray.init(address="local", num_cpus=0, num_gpus=4, include_dashboard=False, object_store_memory=100 << 20)
for gpus, batches in ((2, 10), (2, 3), (2, 1), (0, 10)):
    pool = actor_pool(get_recipe("debug").with_overrides([f"resources.gpus={gpus}"]), batches)
    print("pool:", pool.strategy.min_size, pool.strategy.max_size, pool.num_gpus)
"""
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
    found = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("pool:")]
    assert found == [["2", "4", "1"], ["2", "3", "1"], ["1", "1", "1"], ["1", "1", "None"]], done.stderr
