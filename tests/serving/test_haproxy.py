"""The faults again, with Serve as the files in cluster/ start it: HAProxy in front, gRPC between deployments."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
AS_IN_CLUSTER = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}


@pytest.mark.timeout(570)
def test_faults_behind_haproxy() -> None:
    """Serve reads the variables when it is imported, so they are for a process of its own."""
    asked = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/serving/test_faults.py"]
    done = subprocess.run(asked, cwd=ROOT, env=os.environ | AS_IN_CLUSTER, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("file", ["Dockerfile", "aws-a100.yaml", "gcp-a2.yaml"])
def test_clusters_set_these_variables(file: str) -> None:
    text = (ROOT / "cluster" / file).read_text()
    assert all(f"{name}={value}" in text for name, value in AS_IN_CLUSTER.items())
