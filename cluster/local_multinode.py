"""Several Ray nodes on this machine, for tests and for trying out what a cluster does.

    RAY_AUTH_MODE=disabled python cluster/local_multinode.py --nodes 2 -- python jobs/pipeline.py --recipe debug

The command runs with RAY_ADDRESS set, as on a real cluster; its exit code is this program's. Each node has a raylet and
an object store of its own, and all share the machine's file system.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ray.cluster_utils import Cluster

OBJECT_STORE_BYTES = 100 << 20


class LocalCluster:
    """A head node that runs no work, and worker nodes that can be added and killed."""

    def __init__(self, cluster: Cluster, cpus: int) -> None:
        self._cluster = cluster
        self._cpus = cpus
        self._nodes: list[Any] = []

    @property
    def address(self) -> str:
        """What RAY_ADDRESS and `ray.init` take."""
        return str(self._cluster.address)

    @property
    def node_ids(self) -> list[str]:
        """Ids of the worker nodes that live, the oldest first."""
        return [str(node.node_id) for node in self._nodes]

    def add_node(self) -> str:
        """Start a worker node and wait until it has joined; returns its id, in hexadecimal."""
        node = self._cluster.add_node(num_cpus=self._cpus, object_store_memory=OBJECT_STORE_BYTES)
        self._nodes.append(node)
        return str(node.node_id)

    def kill_node(self, node_id: str) -> None:
        """SIGKILL all processes of a worker node, as a spot machine goes away without notice.

        Raises:
            KeyError: no living worker node has this id.
        """
        node = next((node for node in self._nodes if str(node.node_id) == node_id), None)
        if node is None:
            raise KeyError(node_id)
        self._nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)


@contextmanager
def local_cluster(nodes: int, cpus: int) -> Iterator[LocalCluster]:
    """A running cluster of `nodes` worker nodes with `cpus` CPUs each; nothing of it is left afterwards."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": OBJECT_STORE_BYTES})
    try:
        running = LocalCluster(cluster, cpus)
        for _ in range(nodes):
            running.add_node()
        yield running
    finally:
        cluster.shutdown()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command on a cluster of this machine; returns the command's exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--nodes", type=int, default=2, metavar="N", help="worker nodes (default 2)")
    parser.add_argument("--cpus", type=int, default=1, metavar="N", help="of each node, for Ray's counting (default 1)")
    parser.add_argument("command", nargs="+", help="what to run, after --")
    parsed = parser.parse_args(arguments)
    if min(parsed.nodes, parsed.cpus) < 1:
        parser.error("--nodes and --cpus: must be at least 1")
    with local_cluster(parsed.nodes, parsed.cpus) as cluster:
        return subprocess.run(parsed.command, env=os.environ | {"RAY_ADDRESS": cluster.address}).returncode


if __name__ == "__main__":
    sys.exit(main())
