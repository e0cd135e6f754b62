"""Rows of the matrix with the keys of the engine benchmark's rows, for a table that stands by itself."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cllm.artifacts import write_atomic
from cllm.bench.compare import Ratio, Row
from cllm.bench.methods import JacobiMethod, LookaheadMethod, MethodConfig, VllmMethod, gpus_of

SCHEMA_VERSION = 1
ROWS_NAME = "rows.json"


def write_rows(folder: Path, rows: Sequence[Row]) -> None:
    """Raises InputError if the disk is full."""
    write_atomic(folder / ROWS_NAME, json.dumps(flat_document(rows), indent=1))


def flat_document(rows: Sequence[Row]) -> dict[str, Any]:
    """All rows, and the commands, commits and machines that measured them: a row's `source` is an index of these."""
    sources: list[Mapping[str, Any]] = []
    documents = []
    for row in rows:
        source = {name: value for name, value in row.provenance.items() if name != "time"}
        if source not in sources:
            sources.append(source)
        documents.append(flat_row(row) | {"source": sources.index(source)})
    return {"schema_version": SCHEMA_VERSION, "rows": documents, "sources": sources}


def flat_row(row: Row) -> dict[str, Any]:
    """Plain data. The first keys are those of `cllm.bench.engines.Row`, but for the memory: it is what the load needs
    (`cllm.bench.memory`), for engines reserve what they like.

    Ratios are of medians; `speedup_over_ar` is over AR of the same engine.
    """
    cell, result, step = row.cell, row.result, row.result.step_ms
    engine, score = result.engine, row.accuracy
    return {
        "engine": cell.engine,
        "decoder": _decoder(cell.method),
        "model": cell.model,
        "concurrency": cell.concurrency,
        "n": _window(cell.method),
        "gpus": gpus_of(cell.method),
        "step_ms": step,
        "steps_per_s": None if step is None else 1000 / step,
        "floor_ratio": None if step is None or not result.floor_ms else step / result.floor_ms,
        "tokens_per_s": row.tokens_per_s.mean,
        "tpf": result.tpf,
        "memory_gib": result.memory_gib,
        "method": cell.method.label,
        "accuracy": score and score.mean,
        "accuracy_95": score and [score.low, score.high],
        "speedup_over_vllm_ar": _value(row.over_vllm),
        "speedup_over_ar": _value(row.speedup),
        "trained_parameters": result.trained_parameters,
        "run": cell.run,
        "task": cell.task,
        "seed": cell.seed,
        "tokens_per_s_range": [row.tokens_per_s.low, row.tokens_per_s.high],
        "identical_to_ar": row.identical,
        "device_memory_gib": result.device_memory_gib,
        "runner": engine and engine.runner,
        "scheduling": engine and engine.scheduling,
        "acceptance": engine and engine.acceptance,
        "key": cell.key,
    }


def _decoder(method: MethodConfig) -> str:
    if isinstance(method, VllmMethod):
        return method.method
    if not isinstance(method, JacobiMethod):
        return {"transformers": "generate"}.get(method.kind, method.kind)
    kind = {"block": "jacobi-block", "sliding": "jacobi"}[method.refill]
    return "jacobi-adaptive" if method.policy == "adaptive" else kind


def _window(method: MethodConfig) -> int:
    """Tokens that a step decides on for a row: the seed's successor and the guesses behind it."""
    if isinstance(method, JacobiMethod | LookaheadMethod):
        return method.window
    return 1 + method.guesses if isinstance(method, VllmMethod) and method.method != "ar" else 1


def _value(ratio: Ratio | None) -> float | None:
    return None if ratio is None else ratio.value
