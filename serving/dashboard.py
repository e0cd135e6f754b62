"""The Grafana dashboard over what serving exports.

    python -m serving.dashboard > serving/grafana.json    # then import the file in Grafana

One panel a question of whoever is on call; `serving.metrics` says what is measured.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

_COLUMNS, _WIDTH, _HEIGHT = 3, 8, 8  # Grafana's grid is 24 wide
_SOURCE = {"type": "prometheus", "uid": "${source}"}
_OURS = 'model=~"$model"'


@dataclass(frozen=True, slots=True)
class Panel:
    """One graph.

    Attributes:
        queries: PromQL and the legend of its lines.
        unit: Grafana's name of it.
        kind: lines over time, or a heatmap of a histogram.
    """

    title: str
    text: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    kind: Literal["timeseries", "heatmap"] = "timeseries"


def panels() -> list[Panel]:
    """All panels, in reading order."""
    return [
        Panel("Time to first token", "From the client's asking", "s", _quantiles("ray_cllm_first_token_seconds")),
        Panel("Inter-token latency", "Time between chunks over their tokens", "s",
              _quantiles("ray_cllm_inter_token_seconds")),
        Panel("Queue time", "From the client's asking to a replica", "s", _quantiles("ray_cllm_queue_seconds")),
        Panel("Tokens", "Given to clients, a second", "short", ((_rate("ray_cllm_tokens_total"), "{{model}}"),)),
        Panel("Tokens per forward", "Mean over all steps; quantiles over whole responses", "short",
              ((f"{_rate('ray_cllm_tokens_total')} / {_rate('ray_cllm_accepted_tokens_count')}", "{{model}}"),
               *_quantiles("ray_cllm_tokens_per_forward", (0.1, 0.5, 0.9)))),
        Panel("Acceptance", "Tokens that a step commits to a row", "short",
              ((f"sum by (le) (increase(ray_cllm_accepted_tokens_bucket{{{_OURS}}}[$__rate_interval]))", "{{le}}"),),
              "heatmap"),
        Panel("Window n", "Of the latest step", "short", _spread("ray_cllm_window_tokens")),
        Panel("Batch", "Requests decoded together, and those that wait for a row, of the latest step", "short",
              (*_spread("ray_cllm_batch_rows"), (_sum("ray_cllm_waiting_requests"), "{{model}} waiting"))),
        Panel("KV cache in use", "Share of the blocks, of the fullest replica", "percentunit",
              ((f"max by (model) (ray_cllm_cache_used_ratio{{{_OURS}}})", "{{model}}"),)),
        Panel("Step time", "From step to step of the engine", "s", _quantiles("ray_cllm_step_seconds")),
        Panel("Ends of requests", "error: the engine stopped, or a defect; aborted: the client went away", "reqps",
              ((_rate("ray_cllm_requests_total", "model, outcome"), "{{model}} {{outcome}}"),)),
        Panel("HTTP errors", "503: overload; 429: a key's limit; 5xx else: a defect", "reqps",
              (('sum by (status_code) (rate(ray_serve_num_http_requests_total{status_code!~"2.."}[$__rate_interval]))',
                "{{status_code}}"),)),
    ]  # fmt: skip


def dashboard() -> dict[str, Any]:
    """In Grafana's format."""
    return {
        "uid": "cllm-serving",
        "title": "CLLM serving",
        "tags": ["cllm"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [_source_choice(), _model_choice()]},
        "panels": [_as_grafana(index, panel) for index, panel in enumerate(panels())],
    }


def _as_grafana(index: int, panel: Panel) -> dict[str, Any]:
    row, column = divmod(index, _COLUMNS)
    is_heatmap = panel.kind == "heatmap"
    return {
        "id": index + 1,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": _SOURCE,
        "gridPos": {"x": column * _WIDTH, "y": row * _HEIGHT, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"calculate": False, "yAxis": {"unit": panel.unit}} if is_heatmap else {},
        "targets": [
            {
                "refId": chr(ord("A") + place),
                "datasource": _SOURCE,
                "expr": expression,
                "legendFormat": legend,
                "format": "heatmap" if is_heatmap else "time_series",
            }
            for place, (expression, legend) in enumerate(panel.queries)
        ],
    }


def _source_choice() -> dict[str, Any]:
    return {"name": "source", "label": "Source", "type": "datasource", "query": "prometheus"}


def _model_choice() -> dict[str, Any]:
    query = "label_values(ray_cllm_requests_total, model)"
    return {
        "name": "model",
        "label": "Model",
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": query, "refId": "model"},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "current": {"text": "All", "value": "$__all"},
    }


def _rate(metric: str, by: str = "model") -> str:
    return f"sum by ({by}) (rate({metric}{{{_OURS}}}[$__rate_interval]))"


def _sum(metric: str) -> str:
    return f"sum by (model) ({metric}{{{_OURS}}})"


def _quantiles(histogram: str, shares: Sequence[float] = (0.5, 0.95, 0.99)) -> tuple[tuple[str, str], ...]:
    buckets = _rate(f"{histogram}_bucket", "le, model")
    return tuple((f"histogram_quantile({q}, {buckets})", f"{{{{model}}}} p{round(100 * q)}") for q in shares)


def _spread(gauge: str) -> tuple[tuple[str, str], ...]:
    """Mean and largest over the replicas."""
    return tuple((f"{of} by (model) ({gauge}{{{_OURS}}})", f"{{{{model}}}} {of}") for of in ("avg", "max"))


if __name__ == "__main__":
    json.dump(dashboard(), sys.stdout, indent=1)
    print()
