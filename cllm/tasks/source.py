"""Reading rows from local files or from Hugging Face datasets, with errors that name file, row and key."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from cllm.errors import InputError

Row = dict[str, Any]
_T = TypeVar("_T")

FORMATS = ("jsonl", "json", "csv", "parquet")
_SUFFIXES = tuple(f".{name}{gz}" for name in FORMATS for gz in ("", ".gz"))


def read_rows(source: str, split: str | None = None, *, names: Sequence[str] = ()) -> Iterator[tuple[str, Row]]:
    """The rows of `source`, each with its origin "file:row" (rows count from 1; in JSONL and CSV, the line).

    Args:
        source: a data file (.jsonl, .json, .csv or .parquet, each perhaps with .gz), a folder, or a Hugging Face
            dataset as "name" or "name:configuration". CSV values are strings.
        split: names the file inside a folder, and the split of a Hugging Face dataset.
        names: other file names to look for in a folder, without suffix; first found is read.

    Raises:
        InputError: nothing there, an unknown format, or a malformed file or row.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        wanted = (*([] if split is None else [split]), *names)
        found = find_file(path, *wanted)
        if found is None:
            raise InputError(f"{source}: no file {' or '.join(wanted)} with one of {', '.join(_SUFFIXES)}")
        return read_file(found)
    if path.exists() or source.startswith(("/", ".", "~")) or source.endswith(_SUFFIXES):
        return read_file(path)
    return _read_hub(source, split)


def find_file(folder: str | Path, *names: str) -> Path | None:
    """The first `NAME.{jsonl,json,csv,parquet}[.gz]` in a folder, names in their given order; None if there is none."""
    candidates = (Path(folder) / f"{name}{suffix}" for name in names for suffix in _SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


def has_split(source: str, split: str) -> bool:
    """Whether `read_rows(source, split)` would find that split.

    Raises:
        InputError: neither a folder nor a Hugging Face dataset that can be reached.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return find_file(path, split) is not None
    if path.exists() or source.startswith(("/", ".", "~")):
        raise InputError(f"{source}: expected a folder with files named after the splits, or a Hugging Face dataset")
    import datasets

    name, _, configuration = source.partition(":")
    try:
        return split in datasets.get_dataset_split_names(name, configuration or None)
    except Exception as error:  # the hub's client raises many kinds: connection, authentication, not found
        raise InputError(f"{source}: neither a folder nor a readable Hugging Face dataset: {_line(error)}") from error


def read_file(path: str | Path) -> Iterator[tuple[str, Row]]:
    """The rows of one local data file with their origins; formats and errors as in `read_rows`."""
    path = Path(path)
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix not in readers:
        raise InputError(f"{path}: unknown format; expected one of {', '.join(_SUFFIXES)}")
    try:
        with _open(path) as stream:
            yield from readers[suffix](path, stream)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {_line(error)}") from error


def require(row: Mapping[str, Any], key: str, kind: type[_T], origin: str) -> _T:
    """`row[key]`, checked to be there and of type `kind`.

    Raises:
        InputError: missing or of another type, naming the origin and the key.
    """
    if key not in row:
        raise InputError(f"{origin}: no key {key!r}; the row has {', '.join(sorted(row)) or 'none'}")
    value = row[key]
    if not isinstance(value, kind):
        raise InputError(f"{origin}: {key}: expected {kind.__name__}, got {type(value).__name__} {value!r:.60}")
    return value


def require_any(row: Mapping[str, Any], keys: Sequence[str], kind: type[_T], origin: str) -> _T:
    """As `require`, of the first of `keys` that the row has: one content under the names that several sources use."""
    key = next((key for key in keys if key in row), None)
    if key is None:
        raise InputError(f"{origin}: no key {' or '.join(map(repr, keys))}; the row has {', '.join(sorted(row))}")
    return require(row, key, kind, origin)


def _open(path: Path) -> BinaryIO:
    # GzipFile is a binary stream in all but its declared type.
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _read_jsonl(path: Path, stream: BinaryIO) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(stream, start=1):
        if line.strip():
            origin = f"{path}:{number}"
            yield origin, _as_row(_parse(line, origin), origin)


def _read_json(path: Path, stream: BinaryIO) -> Iterator[tuple[str, Row]]:
    rows = _parse(stream.read(), str(path))
    if not isinstance(rows, list):
        raise InputError(f"{path}: expected a list of rows, got {type(rows).__name__}")
    for number, row in enumerate(rows, start=1):
        origin = f"{path}:{number}"
        yield origin, _as_row(row, origin)


def _read_csv(path: Path, stream: BinaryIO) -> Iterator[tuple[str, Row]]:
    reader = csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), strict=True)
    try:
        for row in reader:
            origin = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                raise InputError(f"{origin}: the row has not as many fields as the header")
            yield origin, row
    except csv.Error as error:
        raise InputError(f"{path}:{reader.reader.line_num}: not CSV: {error}") from error


def _read_parquet(path: Path, stream: BinaryIO) -> Iterator[tuple[str, Row]]:
    # Parquet needs random access, which a gzip stream has only at the price of unpacking it again for each seek.
    seekable = io.BytesIO(stream.read()) if path.suffix == ".gz" else stream
    number = 0
    try:
        for batch in pq.ParquetFile(seekable).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", row
    except pa.ArrowException as error:
        raise InputError(f"{path}: not a readable parquet file: {_line(error)}") from error


def _read_hub(source: str, split: str | None) -> Iterator[tuple[str, Row]]:
    import datasets  # here, for it takes seconds to import and local files do not need it

    name, _, configuration = source.partition(":")
    try:
        rows = datasets.load_dataset(name, configuration or None, split=split or "train", streaming=False)
    except Exception as error:  # the hub's client raises many kinds: connection, authentication, not found
        raise InputError(f"{source}: neither a file nor a readable Hugging Face dataset: {_line(error)}") from error
    for number, row in enumerate(rows, start=1):
        yield f"{source}/{split or 'train'}:{number}", dict(row)


def _parse(text: bytes, origin: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{origin}: not JSON: {_line(error)}") from error


def _as_row(value: Any, origin: str) -> Row:
    if not isinstance(value, dict):
        raise InputError(f"{origin}: expected an object, got {type(value).__name__}")
    return value


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
