"""Several Ray nodes on one machine: work spreads over them, and goes on when one is killed."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from cluster.local_multinode import LocalCluster
from tests.cluster.files import ROOT
from tests.cluster.running import PATIENCE_S, QUIET, attentive_cluster, wait_until

pytestmark = pytest.mark.ray


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    with attentive_cluster(nodes=2, cpus=1) as running:
        yield running


@ray.remote(num_cpus=1, max_retries=2)
def node_after(flag: str, seconds: float) -> str:
    """The node that this runs on, after leaving a sign of having started there."""
    node = ray.get_runtime_context().get_node_id()
    Path(flag, node).touch()
    time.sleep(seconds)
    return node


def test_tasks_use_all_nodes_and_survive_a_killed_one(cluster: LocalCluster, tmp_path: Path) -> None:
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        first, second = (node["NodeID"] for node in ray.nodes() if node["Resources"].get("CPU"))
        tasks = [node_after.remote(str(tmp_path), 3) for _ in range(2)]
        wait_until(lambda: {path.name for path in tmp_path.iterdir()} == {first, second})
        cluster.kill_node(first)
        assert set(ray.get(tasks, timeout=PATIENCE_S)) == {second}
        assert cluster.node_ids == [second]
        with pytest.raises(KeyError):
            cluster.kill_node(first)
    finally:
        ray.shutdown()


def test_the_command_line_runs_a_job_and_returns_its_exit_code() -> None:
    script = "import os, ray; ray.init(log_to_driver=False); print(len(ray.nodes())); raise SystemExit(3)"
    program = [sys.executable, str(ROOT / "cluster" / "local_multinode.py"), "--nodes", "1", "--", sys.executable, "-c"]
    done = subprocess.run(
        [*program, script], env=os.environ | QUIET, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert (done.returncode, done.stdout.split()[-1]) == (3, "2"), done.stderr[-2000:]
