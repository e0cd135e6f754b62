"""Results of earlier schemas in the present one.

    python -m cllm.bench.convert runs/demo/benchmark results/h200

Folders are converted where they are: cells, document, table, and the cells that a judge's scores name. What was not
kept then stays unknown; so a converted cell is not taken for one that would be measured today, and jobs/benchmark.py
measures it again. Its figures can be reported until then.

1: no responses' lengths and forwards, no energy, no test sets and corpora.
2: memory was that of the device; keys knew neither scorer nor tokenizer; prompts left out stood among what cannot run.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cllm.artifacts import write_atomic
from cllm.bench.judged import judge_files
from cllm.bench.matrix import Cell
from cllm.bench.matrix_results import CELLS_NAME, RESULTS_NAME, MatrixResults, write_document, write_record
from cllm.bench.result import SCHEMA_VERSION, CellRecord
from cllm.bench.versioned import read_json, version_of
from cllm.errors import InputError

Data = dict[str, Any]
_LEFT_OUT = (" prompts left out: ", "perplexity on ")  # words of the second schema


def convert_folder(folder: Path) -> int:
    """Convert what is of an earlier schema; how many cells' files that were.

    Raises:
        InputError: a file that is damaged, or of a schema that is not known.
    """
    keys: dict[str, str] = {}
    for path in sorted((folder / CELLS_NAME).glob("*.json")):
        data = read_json(path, missing="")
        if version_of(data) != SCHEMA_VERSION:
            record = convert_record(data, where=str(path))
            write_record(folder, record)
            path.unlink()
            keys[data["key"]] = record.key
    count = len(keys)
    if (folder / RESULTS_NAME).exists():
        keys |= _convert_document(folder)
    for path in judge_files(folder):
        _rename_cells(path, keys)
    return count


def convert_record(data: Data, *, where: str) -> CellRecord:
    """A cell's record of any schema, under the key that it has now.

    Raises:
        InputError: a schema that is not known, or a damaged record.
    """
    data = _upgraded(data, _RECORD_STEPS, where)
    key = Cell.from_data(data["cell"], where=where).key
    return CellRecord.from_data(data | {"key": key}, where=where)


def convert_results(data: Data, *, where: str) -> MatrixResults:
    """The same for a document of records."""
    records = [convert_record(record, where=where).model_dump() for record in data.get("records", ())]
    upgraded = _upgraded(data, _DOCUMENT_STEPS, where)
    return MatrixResults.from_data(upgraded | {"records": records}, where=where)


def _convert_document(folder: Path) -> dict[str, str]:
    """Old keys to new ones."""
    path = folder / RESULTS_NAME
    data = read_json(path, missing="")
    if version_of(data) == SCHEMA_VERSION:
        return {}
    results = convert_results(data, where=str(path))
    write_document(folder, results)
    return {old["key"]: new.key for old, new in zip(data["records"], results.records, strict=True)}


def _rename_cells(path: Path, keys: Mapping[str, str]) -> None:
    data = read_json(path, missing="")
    for cell in data["cells"]:
        for name in ("key", "baseline"):
            cell[name] = keys.get(cell[name], cell[name])
    write_atomic(path, json.dumps(data, indent=1))


def _upgraded(data: Data, steps: Mapping[int, Callable[[Data], Data]], where: str) -> Data:
    version = version_of(data)
    if not isinstance(version, int) or not min(steps) <= version <= SCHEMA_VERSION:
        raise InputError(f"{where}: schema version {version}; known are {min(steps)} to {SCHEMA_VERSION}")
    for step in range(version, SCHEMA_VERSION):
        data = steps[step](data)
    return data | {"schema_version": SCHEMA_VERSION}


def _record_from_1(data: Data) -> Data:
    if data.get("result") is None:
        return data
    return data | {"result": data["result"] | {"response_tokens": (), "response_forwards": ()}}


def _record_from_2(data: Data) -> Data:
    result = data.get("result")
    if result is None:
        return data
    return data | {"result": result | {"memory_gib": None, "device_memory_gib": result.get("memory_gib")}}


def _document_from_2(data: Data) -> Data:
    found = data.get("cannot_run", ())
    left_out = [obstacle for obstacle in found if any(words in obstacle["why"] for words in _LEFT_OUT)]
    cannot_run = [obstacle for obstacle in found if obstacle not in left_out]
    return data | {"cannot_run": cannot_run, "left_out": left_out}


_RECORD_STEPS: Mapping[int, Callable[[Data], Data]] = MappingProxyType({1: _record_from_1, 2: _record_from_2})
_DOCUMENT_STEPS: Mapping[int, Callable[[Data], Data]] = MappingProxyType({1: lambda data: data, 2: _document_from_2})


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code; bad input is one line and code 2."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of results")
    try:
        for folder in parser.parse_args(argv).folders:
            if not folder.is_dir():
                raise InputError(f"{folder}: no such folder")
            print(f"{folder}: {convert_folder(folder)} cells converted to schema {SCHEMA_VERSION}")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
