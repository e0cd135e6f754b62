"""Ray nodes on this machine, for tests that kill some."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from cluster.local_multinode import LocalCluster, local_cluster

PATIENCE_S = 150  # for what takes seconds on an idle machine
QUIET = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
# A dead node is noticed after seconds rather than the half minute that a real network needs.
SOON = {
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "2",
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
}


def wait_until(condition: Callable[[], bool]) -> None:
    """Poll fast: what a test waits for may be over soon."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


@contextmanager
def attentive_cluster(nodes: int, cpus: int) -> Iterator[LocalCluster]:
    """A cluster that notices a dead node soon."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (QUIET | SOON).items():
            patch.setenv(name, value)
        with local_cluster(nodes, cpus) as running:
            yield running
