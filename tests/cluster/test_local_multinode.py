"""Several Ray nodes on one machine: work spreads over them, and goes on when one is killed."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from cluster.local_multinode import LocalCluster, local_cluster
from tests.cluster.files import ROOT

pytestmark = pytest.mark.ray
PATIENCE_S = 150  # for what takes seconds on an idle machine
QUIET = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalCluster]:
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    # A dead node is noticed after seconds rather than the half minute that a real network needs.
    monkeypatch.setenv("RAY_health_check_period_ms", "500")
    monkeypatch.setenv("RAY_health_check_failure_threshold", "2")
    monkeypatch.setenv("RAY_health_check_initial_delay_ms", "500")
    with local_cluster(nodes=2, cpus=1) as running:
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


@pytest.mark.slow
def test_a_job_goes_on_when_a_node_is_killed_during_collection(cluster: LocalCluster, tmp_path: Path) -> None:
    """The debug recipe from prompts to report. Its second half, training included, runs on what is left."""
    run = tmp_path / "run"
    command = [sys.executable, str(ROOT / "jobs" / "pipeline.py"), "--recipe", "debug", "--set", f"output={run}"]
    command += ["--set", "collect.shard_prompts=4"]
    environment = os.environ | {"RAY_ADDRESS": cluster.address, "PYTHONPATH": str(ROOT)}
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=tmp_path)
        try:
            partial = run / "trajectories.partial"
            wait_until(lambda: any(partial.glob("part-*.parquet")))
            third = cluster.add_node()
            cluster.kill_node(cluster.node_ids[0])
            assert third in cluster.node_ids
            assert job.wait(timeout=2 * PATIENCE_S) == 0, (tmp_path / "log").read_text()[-4000:]
        finally:
            job.kill()
            job.wait()
    assert (run / "evaluation" / "results.json").exists()


def test_the_command_line_runs_a_job_and_returns_its_exit_code() -> None:
    script = "import os, ray; ray.init(log_to_driver=False); print(len(ray.nodes())); raise SystemExit(3)"
    program = [sys.executable, str(ROOT / "cluster" / "local_multinode.py"), "--nodes", "1", "--", sys.executable, "-c"]
    done = subprocess.run(
        [*program, script], env=os.environ | QUIET, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert (done.returncode, done.stdout.split()[-1]) == (3, "2"), done.stderr[-2000:]
