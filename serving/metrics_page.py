"""One page with the metrics of serving of all nodes, for Prometheus installations that do not watch Ray's own pages."""

import asyncio
import urllib.request
from collections.abc import Iterable, Iterator

import ray
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

# Ours, and what Serve's proxies answered: a request that no replica took is counted there alone.
_SHOWN = ("ray_cllm_", "ray_serve_num_http_requests")
_TIMEOUT_S = 5


async def read_cluster_metrics() -> str:
    """In Prometheus' text format; nodes that do not answer are left out."""
    nodes = await asyncio.to_thread(ray.nodes)
    urls = [f"http://{n['NodeManagerAddress']}:{n['MetricsExportPort']}/metrics" for n in nodes if n["Alive"]]
    return merge_pages(await asyncio.gather(*(asyncio.to_thread(_read, url) for url in urls)))


def merge_pages(pages: Iterable[str]) -> str:
    """The samples of the metrics to be shown, each metric described once."""
    merged: dict[str, Metric] = {}
    for page in pages:
        for family in text_string_to_metric_families(page):
            if family.name.startswith(_SHOWN):
                merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                merged[family.name].samples += family.samples
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Fixed(merged.values()))
    return generate_latest(registry).decode()


class _Fixed:
    """Metrics that are there already, as a collector."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = list(metrics)

    def collect(self) -> Iterator[Metric]:
        return iter(self._metrics)


def _read(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:
            return str(response.read().decode())
    except OSError:
        return ""
