"""Results of the matrix on disk: one JSON file a cell, which is what counts, and a document and a table of them all.

`FOLDER/cells/KEY.json` is written whole or not at all, so what a killed job leaves is complete. Files of other machines
may be put beside them: a key names everything that decides a measurement, the device included. The document adds what
could not run; a folder that has it alone, without the cells, can be read as well.
"""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from cllm.artifacts import write_atomic
from cllm.bench.matrix import MatrixRecipe, Obstacle
from cllm.bench.result import SCHEMA_VERSION
from cllm.bench.result import CellRecord as CellRecord
from cllm.bench.result import CellResult as CellResult
from cllm.bench.table import as_table
from cllm.bench.versioned import read_versioned
from cllm.config import Config
from cllm.errors import InputError

CELLS_NAME = "cells"
RESULTS_NAME = "results.json"
TABLE_NAME = "results.parquet"
_MISSING = "run jobs/benchmark.py"


class MatrixResults(Config):
    """All records of a folder, or of several; what could not run, and what the cells were not asked."""

    schema_version: int = SCHEMA_VERSION
    matrices: tuple[str, ...]
    records: tuple[CellRecord, ...]
    cannot_run: tuple[Obstacle, ...] = ()
    left_out: tuple[Obstacle, ...] = ()

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


def write_results(
    folder: Path, matrix: MatrixRecipe, cannot_run: Sequence[Obstacle], left_out: Sequence[Obstacle] = ()
) -> MatrixResults:
    """Gather all records of a folder, those of other machines included, into the document and the table."""
    results = MatrixResults(
        matrices=(matrix.name,),
        records=tuple(read_records(folder).values()),
        cannot_run=tuple(cannot_run),
        left_out=tuple(left_out),
    )
    write_document(folder, results)
    return results


def write_document(folder: Path, results: MatrixResults) -> None:
    """Write document and table. Raises InputError if the disk is full."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / RESULTS_NAME, _json(results))
    buffer = io.BytesIO()
    pq.write_table(as_table(results.records), buffer)
    write_atomic(folder / TABLE_NAME, buffer.getvalue())


def read_results(folders: Iterable[Path]) -> MatrixResults:
    """Results of several folders as one. Of records with one key a finished one wins, else the first.

    Raises:
        InputError: no folder, or one with neither cells nor a document, or with a file that is damaged or of another
            schema version.
    """
    parts = [_read_folder(folder) for folder in folders]
    if not parts:
        raise InputError("no folder of results given")
    return MatrixResults(
        matrices=tuple(dict.fromkeys(name for part in parts for name in part.matrices)),
        records=_best([record for part in parts for record in part.records]),
        cannot_run=_distinct([obstacle for part in parts for obstacle in part.cannot_run]),
        left_out=_distinct([obstacle for part in parts for obstacle in part.left_out]),
    )


def _read_folder(folder: Path) -> MatrixResults:
    """The cells' files, which are newer than the document where a job was killed or files were put beside them."""
    records, path = tuple(read_records(folder).values()), folder / RESULTS_NAME
    if records and not path.exists():
        return MatrixResults(matrices=(folder.name,), records=records)
    document = MatrixResults.from_data(_read(path), where=str(path))
    return document.model_copy(update={"records": _best([*records, *document.records])})


def _best(records: Sequence[CellRecord]) -> tuple[CellRecord, ...]:
    """One record a key."""
    found: dict[str, CellRecord] = {}
    for record in records:
        known = found.setdefault(record.key, record)
        if (known.status, record.status) == ("failed", "done"):
            found[record.key] = record
    return tuple(found.values())


def _distinct(obstacles: Sequence[Obstacle]) -> tuple[Obstacle, ...]:
    return tuple({str(obstacle): obstacle for obstacle in obstacles}.values())


def _read(path: Path) -> Any:
    folder = path.parent if path.name == RESULTS_NAME else path.parents[1]
    outdated = f"convert the folder: python -m cllm.bench.convert {folder}"
    return read_versioned(path, SCHEMA_VERSION, outdated=outdated, missing=_MISSING)


def _json(config: Config) -> str:
    return config.model_dump_json(indent=1)
