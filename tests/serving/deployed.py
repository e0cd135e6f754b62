"""A real Serve application on a Ray of its own, and what its metrics say."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray import serve

from serving.build import app


@contextmanager
def deployed(args: dict[str, Any], name: str) -> Iterator[str]:
    """The URL of the application with these arguments; metrics come every half second rather than every ten."""
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 << 20,
        log_to_driver=False,
        _system_config={"metrics_report_interval_ms": 500},
    )
    with socket.create_server(("127.0.0.1", 0)) as free:  # as late as can be: it may be taken in between
        port = free.getsockname()[1]
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(app(args), name=name, route_prefix="/")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def replica_pids(application: str, deployment: str) -> list[int]:
    """Of the processes that hold the deployment's replicas."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                title = (entry / "cmdline").read_text()
            except OSError:
                continue
            if title.startswith(f"ray::ServeReplica:{application}:{deployment}"):
                found.append(int(entry.name))
    return found


def samples(url: str, **labels: str) -> dict[str, float]:
    """Of /metrics: name -> sum over the samples that have these labels, buckets left out."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text):
        for sample in family.samples:
            if not sample.name.endswith("_bucket") and labels.items() <= sample.labels.items():
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found
