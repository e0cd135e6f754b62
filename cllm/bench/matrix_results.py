"""Results of the matrix on disk: one JSON file a cell while it runs, one JSON document and one table at the end.

`FOLDER/cells/KEY.json` is written whole or not at all, so what a killed job leaves is complete. Files of other machines
may be put beside them: a key names everything that decides a measurement, the device included.
"""

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from cllm.artifacts import write_atomic
from cllm.bench.matrix import Cell, MatrixRecipe, Obstacle
from cllm.config import Config
from cllm.errors import InputError
from cllm.evaluation.metrics import accuracy

SCHEMA_VERSION = 2
CELLS_NAME = "cells"
RESULTS_NAME = "results.json"
TABLE_NAME = "results.parquet"


class CellResult(Config):
    """What a finished cell found.

    What is given per prompt stands in the order of `prompt_ids`. Both turns of a conversation are prompts: first come
    all first turns, then all second ones (`cllm.tasks.prompts.second_turn_id`).

    Attributes:
        tokens_per_s: one figure a repeat, new tokens of all requests over the time from the first to the last.
        energy_j: joules per new token of each timed repeat, of the whole GPU; () where the device has no counter.
        tpf: tokens a forward and request.
        latency_ms: percentiles (nearest rank) of the time from a request's start to its last token.
        floor_ms: the time in which the device copies as many bytes as the weights have.
        memory_gib: device memory in use, by an engine with room for the most requests that it served.
        scores: in [0, 1], one per prompt; () where only a judge could tell (`metric` says so), or nothing is scored.
        response_digests: hashes of the responses' tokens.
        response_tokens: new tokens, end tokens included.
        response_forwards: forward passes that committed tokens of the response.
        categories: the task's; () where it has none.
        responses: texts, kept only where the metric is a judge's.
        parameters: of the model; None where its configuration does not tell.
        trained_parameters: what was trained on top of the teacher: all weights of a CLLM (or its adapters), the draft
            model, the heads, or their sum; 0 for the teacher; None for what others trained and keep elsewhere.
        fast_forwarded, stationary: of the paper's section 4.2; only for its Jacobi decoding.
        reference_perplexity: on the held-out reference answers; only for AR, and where all prompts have one.
        perplexity: by corpus, per token (`cllm.evaluation.corpora`); only for AR with one request in flight.
        word_perplexity: the same per word, which compares models of different tokenizers.
    """

    metric: str
    tokens_per_s: tuple[float, ...] = Field(min_length=1)
    energy_j: tuple[float, ...] = ()
    tpf: float
    latency_ms: Mapping[str, float]
    floor_ms: float
    memory_gib: float | None = None
    prompt_ids: tuple[str, ...]
    scores: tuple[float, ...]
    response_digests: tuple[str, ...]
    response_tokens: tuple[int, ...]
    response_forwards: tuple[int, ...]
    mean_response_tokens: float
    categories: tuple[str, ...] = ()
    responses: tuple[str, ...] = ()
    parameters: int | None = None
    trained_parameters: int | None = None
    fast_forwarded: float | None = None
    stationary: float | None = None
    reference_perplexity: float | None = None
    perplexity: Mapping[str, float] = {}
    word_perplexity: Mapping[str, float] = {}

    @model_validator(mode="after")
    def _one_entry_per_prompt(self) -> "CellResult":
        required = ("response_digests", "response_tokens", "response_forwards")
        optional = ("scores", "categories", "responses")
        for name in (*required, *optional):
            count = len(getattr(self, name))
            if count != len(self.prompt_ids) and (count or name in required):
                raise ValueError(f"{name}: {count} entries for {len(self.prompt_ids)} prompts")
        return self


class CellRecord(Config):
    """One cell's file: what was measured, how it went, and where."""

    schema_version: int = SCHEMA_VERSION
    key: str
    status: Literal["done", "failed"]
    cell: Cell
    attempts: int
    seconds: float
    provenance: Mapping[str, Any]
    result: CellResult | None = None
    error: str | None = None


class MatrixResults(Config):
    """All records of a folder, or of several, and what could not run."""

    schema_version: int = SCHEMA_VERSION
    matrices: tuple[str, ...]
    records: tuple[CellRecord, ...]
    cannot_run: tuple[Obstacle, ...] = ()

    @property
    def done(self) -> list[CellRecord]:
        return [record for record in self.records if record.status == "done"]

    @property
    def failed(self) -> list[CellRecord]:
        return [record for record in self.records if record.status == "failed"]


def write_record(folder: Path, record: CellRecord) -> None:
    """Raises InputError if the disk is full."""
    path = folder / CELLS_NAME / f"{record.key}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, _json(record))


def read_records(folder: Path) -> dict[str, CellRecord]:
    """The records of a folder by key.

    Raises:
        InputError: a file that is damaged, of another schema version, or under another name than its content's key.
    """
    found = {}
    for path in sorted((folder / CELLS_NAME).glob("*.json")):
        record = CellRecord.from_data(_read(path), where=str(path))
        if not path.stem == record.key == record.cell.key:
            raise InputError(f"{path}: the cell inside has the key {record.cell.key}; remove the file")
        found[record.key] = record
    return found


def write_results(folder: Path, matrix: MatrixRecipe, cannot_run: Sequence[Obstacle]) -> MatrixResults:
    """Gather all records of a folder, those of other machines included, into the document and the table."""
    records = tuple(read_records(folder).values())
    results = MatrixResults(matrices=(matrix.name,), records=records, cannot_run=tuple(cannot_run))
    write_atomic(folder / RESULTS_NAME, _json(results))
    buffer = io.BytesIO()
    pq.write_table(as_table(records), buffer)
    write_atomic(folder / TABLE_NAME, buffer.getvalue())
    return results


def read_results(folders: Iterable[Path]) -> MatrixResults:
    """Results of several folders as one. Of records with one key a finished one wins, else the first.

    Raises:
        InputError: no folder, or a results file that is missing, damaged or of another schema version.
    """
    parts = [_read_part(folder / RESULTS_NAME) for folder in folders]
    if not parts:
        raise InputError("no folder of results given")
    records: dict[str, CellRecord] = {}
    for record in (record for part in parts for record in part.records):
        known = records.get(record.key)
        if known is None or (known.status, record.status) == ("failed", "done"):
            records[record.key] = record
    obstacles = dict.fromkeys(str(obstacle) for part in parts for obstacle in part.cannot_run)
    by_text = {str(obstacle): obstacle for part in parts for obstacle in part.cannot_run}
    return MatrixResults(
        matrices=tuple(dict.fromkeys(name for part in parts for name in part.matrices)),
        records=tuple(records.values()),
        cannot_run=tuple(by_text[text] for text in obstacles),
    )


_COLUMNS = pa.schema(
    [
        ("schema_version", pa.int32()),
        ("key", pa.string()),
        ("status", pa.string()),
        ("run", pa.string()),
        ("task", pa.string()),
        ("model", pa.string()),
        ("engine", pa.string()),
        ("method", pa.string()),
        ("settings", pa.string()),  # of the method, JSON
        ("concurrency", pa.int32()),
        ("seed", pa.int64()),
        ("device", pa.string()),
        ("data", pa.string()),
        ("weights", pa.string()),
        ("accuracy", pa.float64()),
        ("accuracy_low", pa.float64()),
        ("accuracy_high", pa.float64()),
        ("tpf", pa.float64()),
        ("tokens_per_s", pa.float64()),
        ("tokens_per_s_repeats", pa.list_(pa.float64())),
        ("latency_p50_ms", pa.float64()),
        ("latency_p90_ms", pa.float64()),
        ("latency_p99_ms", pa.float64()),
        ("floor_ms", pa.float64()),
        ("memory_gib", pa.float64()),
        ("energy_j", pa.float64()),  # joules per new token, median of the repeats
        ("parameters", pa.int64()),
        ("trained_parameters", pa.int64()),
        ("perplexity", pa.map_(pa.string(), pa.float64())),  # by corpus, per token
        ("seconds", pa.float64()),
        ("error", pa.string()),
        ("commit", pa.string()),
        ("command", pa.string()),
        ("time", pa.string()),
    ]
)


def as_table(records: Sequence[CellRecord]) -> pa.Table:
    """One row a cell; what a cell does not have is null."""
    return pa.Table.from_pylist([_flat(record) for record in records], schema=_COLUMNS)


def _flat(record: CellRecord) -> dict[str, Any]:
    cell = record.cell
    row = {name: getattr(cell, name) for name in ("run", "task", "model", "engine", "concurrency", "seed", "data")}
    return {
        **row,
        "schema_version": record.schema_version,
        "key": record.key,
        "status": record.status,
        "method": cell.method.label,
        "settings": cell.method.model_dump_json(),
        "device": cell.platform.device,
        "weights": cell.weights,
        "seconds": record.seconds,
        "error": record.error,
        "commit": record.provenance.get("commit"),
        "command": " ".join(record.provenance.get("command", ())),
        "time": record.provenance.get("time"),
        **({} if record.result is None else _figures(record.result)),
    }


def _figures(result: CellResult) -> dict[str, Any]:
    score = accuracy(result.scores) if result.scores else None
    return {
        "accuracy": score and score.mean,
        "accuracy_low": score and score.low,
        "accuracy_high": score and score.high,
        "tpf": result.tpf,
        "tokens_per_s": median(result.tokens_per_s),
        "tokens_per_s_repeats": list(result.tokens_per_s),
        **{f"latency_{name}_ms": value for name, value in result.latency_ms.items()},
        "floor_ms": result.floor_ms,
        "memory_gib": result.memory_gib,
        "energy_j": median(result.energy_j) if result.energy_j else None,
        "parameters": result.parameters,
        "trained_parameters": result.trained_parameters,
        "perplexity": list(result.perplexity.items()),
    }


def _read_part(path: Path) -> MatrixResults:
    return MatrixResults.from_data(_read(path), where=str(path))


def _read(path: Path) -> Any:
    """JSON of our schema version. The version comes first: fields of another one would only confuse."""
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; run jobs/benchmark.py") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable JSON file ({error})") from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        way = "update this code to read it" if isinstance(version, int) and version > SCHEMA_VERSION else _OUTDATED
        raise InputError(f"{path}: schema version {version}, this code reads {SCHEMA_VERSION}; {way}")
    return data


_OUTDATED = "nothing converts it, so remove the file and run jobs/benchmark.py again, which measures what is missing"


def _json(config: Config) -> str:
    return config.model_dump_json(indent=1)
