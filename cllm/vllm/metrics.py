"""What vLLM counts, in our words."""

from collections.abc import Sequence
from typing import Any

from cllm.decoding.stats import Acceptance

_PREFIX = "vllm:spec_decode_num_"
_COUNTERS = ("drafts", "draft_tokens", "accepted_tokens")
_CACHE_USED, _WAITING = "vllm:kv_cache_usage_perc", "vllm:num_requests_waiting"


def acceptance_of_metrics(metrics: Sequence[Any]) -> Acceptance:
    """From the counters that vLLM keeps of its speculative methods (`LLM.get_metrics`)."""
    found = {metric.name: metric for metric in metrics}
    steps, proposed, accepted = (found[_PREFIX + name].value for name in _COUNTERS)
    return Acceptance(steps, proposed, accepted, tuple(found[f"{_PREFIX}accepted_tokens_per_pos"].values))


def acceptance_of_counts(counts: Sequence[Sequence[int]]) -> Acceptance:
    """From how often a row with w inputs committed a tokens: entry [w][a]. Rows without guesses are left out."""
    widths = range(2, len(counts))
    steps = sum(sum(counts[w]) for w in widths)
    proposed = sum((w - 1) * sum(counts[w]) for w in widths)
    accepted_at = tuple(sum(sum(counts[w][place + 1 :]) for w in widths) for place in range(1, len(counts) - 1))
    return Acceptance(steps, proposed, sum(accepted_at), accepted_at)


def load() -> tuple[int | None, float | None]:
    """Requests that wait for a row, and the share of the cache in use, by the registry of this process; None where
    vLLM does not keep them.
    """
    from prometheus_client import REGISTRY

    found = REGISTRY.restricted_registry((_WAITING, _CACHE_USED)).collect()
    gauges = {sample.name: sample.value for metric in found for sample in metric.samples}
    waiting = gauges.get(_WAITING)
    return None if waiting is None else int(waiting), gauges.get(_CACHE_USED)
