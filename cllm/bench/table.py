"""Cells as one flat table: what results.json holds, but for what is given per prompt."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import pyarrow as pa

from cllm.bench.result import CellRecord, CellResult, EngineFacts
from cllm.evaluation.metrics import Estimate, accuracy

_TEXT, _INT, _FLOAT = pa.string(), pa.int64(), pa.float64()
_BY_NAME = pa.map_(_TEXT, _FLOAT)
_Columns = Mapping[str, tuple[pa.DataType, Callable[[Any], Any]]]


def _score(result: CellResult) -> Estimate | None:
    return accuracy(result.scores) if result.scores else None


def _middle(repeats: Sequence[float]) -> float | None:
    return median(repeats) if repeats else None


_RECORD: _Columns = {
    "schema_version": (pa.int32(), lambda record: record.schema_version),
    "key": (_TEXT, lambda record: record.key),
    "status": (_TEXT, lambda record: record.status),
    "run": (_TEXT, lambda record: record.cell.run),
    "task": (_TEXT, lambda record: record.cell.task),
    "test": (_TEXT, lambda record: record.cell.test),  # the task again where it is another test set than the run's own
    "model": (_TEXT, lambda record: record.cell.model),
    "engine": (_TEXT, lambda record: record.cell.engine),
    "method": (_TEXT, lambda record: record.cell.method.label),
    "settings": (_TEXT, lambda record: record.cell.method.model_dump_json()),  # of the method
    "own_model": (pa.bool_(), lambda record: record.cell.own_model),
    "concurrency": (pa.int32(), lambda record: record.cell.concurrency),
    "seed": (_INT, lambda record: record.cell.seed),
    "num_prompts": (_INT, lambda record: record.cell.load.num_prompts),
    "speed_prompts": (_INT, lambda record: record.cell.load.timed_prompts(record.cell.concurrency)),
    "repeats": (_INT, lambda record: record.cell.load.repeats),
    "max_new_tokens": (_INT, lambda record: record.cell.load.max_new_tokens),
    "temperature": (_FLOAT, lambda record: record.cell.load.temperature),
    "top_p": (_FLOAT, lambda record: record.cell.load.top_p),
    "precision": (_TEXT, lambda record: record.cell.precision),
    "device": (_TEXT, lambda record: record.cell.platform.device),
    "threads": (_INT, lambda record: record.cell.platform.threads),
    "versions": (pa.map_(_TEXT, _TEXT), lambda record: list(record.cell.platform.versions.items())),
    "data": (_TEXT, lambda record: record.cell.data),
    "scorer": (_TEXT, lambda record: record.cell.scorer),
    "tokenizer": (_TEXT, lambda record: record.cell.tokenizer),
    "weights": (_TEXT, lambda record: record.cell.weights),
    "draft": (_TEXT, lambda record: record.cell.draft),
    "attempts": (pa.int32(), lambda record: record.attempts),
    "seconds": (_FLOAT, lambda record: record.seconds),
    "error": (_TEXT, lambda record: record.error),
    "commit": (_TEXT, lambda record: record.provenance.get("commit")),
    "dirty": (pa.bool_(), lambda record: record.provenance.get("dirty")),
    "command": (_TEXT, lambda record: " ".join(record.provenance.get("command", ()))),
    "time": (_TEXT, lambda record: record.provenance.get("time")),
}
_RESULT: _Columns = {
    "metric": (_TEXT, lambda result: result.metric),
    "scores": (pa.list_(_FLOAT), lambda result: list(result.scores)),
    "accuracy": (_FLOAT, lambda result: (found := _score(result)) and found.mean),
    "accuracy_low": (_FLOAT, lambda result: (found := _score(result)) and found.low),
    "accuracy_high": (_FLOAT, lambda result: (found := _score(result)) and found.high),
    "tpf": (_FLOAT, lambda result: result.tpf),
    "mean_response_tokens": (_FLOAT, lambda result: result.mean_response_tokens),
    "tokens_per_s": (_FLOAT, lambda result: _middle(result.tokens_per_s)),
    "tokens_per_s_repeats": (pa.list_(_FLOAT), lambda result: list(result.tokens_per_s)),
    "latency_p50_ms": (_FLOAT, lambda result: result.latency_ms.get("p50")),
    "latency_p90_ms": (_FLOAT, lambda result: result.latency_ms.get("p90")),
    "latency_p99_ms": (_FLOAT, lambda result: result.latency_ms.get("p99")),
    "step_ms": (_FLOAT, lambda result: result.step_ms),
    "floor_ms": (_FLOAT, lambda result: result.floor_ms),
    "memory_gib": (_FLOAT, lambda result: result.memory_gib),
    "device_memory_gib": (_FLOAT, lambda result: result.device_memory_gib),
    "energy_j": (_FLOAT, lambda result: _middle(result.energy_j)),  # joules per new token
    "energy_j_repeats": (pa.list_(_FLOAT), lambda result: list(result.energy_j)),
    "parameters": (_INT, lambda result: result.parameters),
    "trained_parameters": (_INT, lambda result: result.trained_parameters),
    "fast_forwarded": (_FLOAT, lambda result: result.fast_forwarded),
    "stationary": (_FLOAT, lambda result: result.stationary),
    "reference_perplexity": (_FLOAT, lambda result: result.reference_perplexity),
    "perplexity": (_BY_NAME, lambda result: list(result.perplexity.items())),  # by corpus, per token
    "word_perplexity": (_BY_NAME, lambda result: list(result.word_perplexity.items())),
}
_ENGINE: _Columns = {
    "package": (_TEXT, lambda engine: engine.package),
    "package_version": (_TEXT, lambda engine: engine.version),
    "runner": (_TEXT, lambda engine: engine.runner),
    "scheduling": (_TEXT, lambda engine: engine.scheduling),
    "guesses": (_INT, lambda engine: engine.guesses),
    "guesses_proposed": (_INT, lambda engine: engine.proposed),
    "guesses_accepted": (_INT, lambda engine: engine.accepted),
    "guesses_accepted_at": (pa.list_(_INT), lambda engine: engine.accepted_at and list(engine.accepted_at)),
}
COLUMNS = pa.schema([(name, kind) for part in (_RECORD, _RESULT, _ENGINE) for name, (kind, _) in part.items()])


def as_table(records: Sequence[CellRecord]) -> pa.Table:
    """One row a cell; what a cell does not have is null."""
    return pa.Table.from_pylist([_flat(record) for record in records], schema=COLUMNS)


def _flat(record: CellRecord) -> dict[str, Any]:
    engine = record.result.engine if record.result else None
    return _read(_RECORD, record) | _read(_RESULT, record.result) | _read(_ENGINE, engine)


def _read(columns: _Columns, source: CellRecord | CellResult | EngineFacts | None) -> dict[str, Any]:
    return {} if source is None else {name: read(source) for name, (_, read) in columns.items()}
