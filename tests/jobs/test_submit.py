"""The command of docs/cluster.md that submits a run: the working folder goes to a job server, and the run ends well."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from cllm.artifacts import read_manifest
from cluster.local_multinode import OBJECT_STORE_BYTES
from tests.jobs.running import PATIENCE_S, ROOT, FinishedRun, arguments

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the command names the commit, and this is no checkout"),
]


@dataclass(frozen=True, slots=True)
class Submitted:
    """A run that a job continued, what the submitting command printed, and the checkout's commit at that time."""

    run: FinishedRun
    done: subprocess.CompletedProcess[str]
    commit: str


def documented_command() -> str:
    """With its lines as one."""
    text = (ROOT / "docs" / "cluster.md").read_text().replace("\\\n", " ")
    (command,) = re.findall(r"^    (ray job submit .* -- python jobs/pipeline\.py .*)$", text, re.MULTILINE)
    return command


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def job_server() -> Iterator[str]:
    """A head node alone: several nodes on one machine would delete each other's copy of the working folder."""
    head = {"num_cpus": 2, "object_store_memory": OBJECT_STORE_BYTES}
    # The agent starts jobs. Its own port would be another Ray's of this machine, and then the job waits for ever.
    agent = {"dashboard_agent_listen_port": free_port()}
    dashboard = agent | {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": free_port()}
    cluster = Cluster(initialize_head=True, head_node_args=head | dashboard)
    try:
        yield f"http://{cluster.webui_url}"
    finally:
        cluster.shutdown()


def submit(command: str) -> subprocess.CompletedProcess[str]:
    """Run by a shell in the checkout; again while the head node's agent, which starts jobs, is itself starting."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=2 * PATIENCE_S)
        if "No available agent" not in done.stderr or time.monotonic() > deadline:
            return done
        time.sleep(1)


@pytest.fixture(scope="module")
def submitted(pipeline: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Submitted:
    """The debug recipe, begun elsewhere: training and evaluation are left to do. Waited for, its output shown."""
    run = pipeline.copy(tmp_path_factory.mktemp("submit") / "run", "prompts", "teacher", "trajectories")
    before, _, _ = documented_command().replace("--no-wait ", "").partition("--recipe ")
    command = f"{before} {' '.join(arguments(run.overrides))}"
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        with job_server() as address:
            patch.setenv("RAY_ADDRESS", address)
            return Submitted(run, submit(command), commit.strip())


def test_the_job_ends_well(submitted: Submitted) -> None:
    done = submitted.done
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "succeeded" in done.stdout
    for kind in ("prompts", "teacher", "trajectories"):
        assert f"== {kind}: up to date" in done.stdout
    summary = next(line for line in done.stdout.splitlines() if line.startswith("{"))
    assert json.loads(summary)["task"] == submitted.run.recipe.task.name


def test_the_copy_of_the_working_folder_ran_and_knows_its_commit(submitted: Submitted) -> None:
    """Git tells nothing there, and so nothing of uncommitted changes: the commit is the command's."""
    provenance = read_manifest(submitted.run.layout.student, "student").provenance
    assert (provenance["commit"], provenance["dirty"]) == (submitted.commit, None)
