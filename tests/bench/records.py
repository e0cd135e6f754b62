"""Cells and records by hand."""

from typing import Any

from cllm.bench.matrix import Cell, LoadConfig, Platform
from cllm.bench.matrix_results import MatrixResults
from cllm.bench.methods import ArMethod, JacobiMethod, MethodConfig, VllmMethod
from cllm.bench.result import CellRecord, CellResult, EngineFacts

PROVENANCE = {
    "commit": "0123456789abcdef",
    "dirty": False,
    "versions": {"python": "3.11", "torch": "2.13"},
    "hardware": {"cpu": "test cpu", "cores": 2, "memory_gib": 8.0, "gpus": []},
    "command": ["jobs/benchmark.py", "--matrix", "demo"],
    "time": "2026-01-01T00:00:00+00:00",
}
AR, BLOCK, VLLM = ArMethod(), JacobiMethod(window=4, refill="block"), VllmMethod()


def make_cell(method: MethodConfig = AR, **changed: Any) -> Cell:
    fields: dict[str, Any] = {
        "run": "demo",
        "task": "synthetic_sql",
        "data": "d" * 16,
        "model": "teacher",
        "weights": "w" * 16,
        "method": method,
        "concurrency": 1,
        "seed": 0,
        "load": LoadConfig(num_prompts=4, max_new_tokens=8),
        "precision": "auto",
        "platform": Platform(device="test cpu", threads=2, versions={"torch": "2.13"}),
    }
    return Cell(**fields | changed)


def make_result(tokens_per_s: tuple[float, ...] = (90.0, 100.0, 120.0), **changed: Any) -> CellResult:
    fields: dict[str, Any] = {
        "metric": "execution accuracy",
        "tokens_per_s": tokens_per_s,
        "tpf": 1.0,
        "latency_ms": {"p50": 10.0, "p90": 20.0, "p99": 30.0},
        "floor_ms": 2.0,
        "prompt_ids": ("a", "b", "c", "d"),
        "scores": (1.0, 1.0, 0.0, 0.0),
        "response_digests": ("1", "2", "3", "4"),
        "response_tokens": (8, 8, 8, 6),
        "response_forwards": (8, 8, 8, 6),
        "mean_response_tokens": 7.5,
        "parameters": 1_900_000,
        "engine": EngineFacts(package="cllm", version="0", scheduling="sync", guesses=0),
    }
    return CellResult(**fields | changed)


def make_record(cell: Cell | None = None, result: CellResult | None = None, **changed: Any) -> CellRecord:
    cell = cell or make_cell()
    fields: dict[str, Any] = {
        "key": cell.key,
        "status": "done",
        "cell": cell,
        "attempts": 1,
        "seconds": 1.5,
        "provenance": PROVENANCE,
        "result": result or make_result(),
    }
    return CellRecord(**fields | changed)


def failed_record(cell: Cell, error: str) -> CellRecord:
    return make_record(cell).model_copy(update={"status": "failed", "result": None, "error": error, "attempts": 2})


def make_results(*records: CellRecord, **changed: Any) -> MatrixResults:
    return MatrixResults(**{"matrices": ("demo",), "records": records} | changed)
