"""Finished output folders: written whole or not at all, and checked when read.

A stage writes into a working folder beside its target. The manifest is written last and the folder is then renamed, so
a folder with a manifest is complete. `write_artifact` starts afresh each time; `resumable_artifact` continues the
working folder of a run that was killed.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cllm.config import Config, digest
from cllm.errors import InputError

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
INPUTS_NAME = "inputs.json"  # what a resumable working folder is made from
HASHED_BYTES = 1 << 20  # files up to 1 MiB are hashed at each reading; weights and shards would take minutes
WEIGHTS_SUFFIX = ".safetensors"  # files whose hash is recorded all the same: it names the model from then on
ABSENT = "(absent)"  # stands for the value of a key that one of two inputs does not have


class FileEntry(Config):
    """One file of an artifact; `path` is relative to its folder, with forward slashes."""

    path: str
    num_bytes: int
    sha256: str | None = None  # None: larger than HASHED_BYTES, and no weights


class Manifest(Config):
    """What an artifact is, what it was made from, and what it consists of."""

    kind: str
    schema_version: int
    inputs_digest: str
    inputs: dict[str, Any]
    provenance: dict[str, Any]
    files: tuple[FileEntry, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """The first key, dotted, in which an artifact's inputs are not the wanted ones."""

    key: str
    found: Any
    wanted: Any


@contextmanager
def write_artifact(
    path: Path, *, kind: str, inputs: Mapping[str, Any], provenance: Mapping[str, Any]
) -> Iterator[Path]:
    """Yield an empty working folder that becomes `path` on normal exit and is removed on an exception.

    An older artifact at `path` is replaced; it stays until the new one is complete.

    Raises:
        InputError: `path` holds something else than an artifact, another process is writing it, or the disk is full.
    """
    working = _sibling(path, "tmp")
    with _disk_full_named(path), _exclusive(path):
        _check_replaceable(path)
        _remove(working)  # left by a killed run
        working.mkdir()
        try:
            yield working
            _finish(working, path, kind, inputs, provenance)
        except BaseException:
            _remove(working)
            raise


@contextmanager
def resumable_artifact(
    path: Path,
    *,
    kind: str,
    inputs: Mapping[str, Any],
    provenance: Mapping[str, Any],
    discard_outdated: bool = False,
) -> Iterator[Path]:
    """Yield the working folder `<path>.partial`, with whatever an interrupted run left in it; it becomes `path`.

    On an exception, as on a kill, the working folder stays. The caller must write its files atomically
    (`write_atomic`), for a file that exists is taken to be complete.

    Raises:
        InputError: the working folder was made from other inputs (the differing key is named) and `discard_outdated`
            is false; or as `write_artifact`.
    """
    working = _sibling(path, "partial")
    with _disk_full_named(path), _exclusive(path):
        _check_replaceable(path)
        recorded = {"kind": kind, "schema_version": SCHEMA_VERSION, "inputs": _as_json(inputs)}
        difference = _difference_to_partial(working, recorded)
        if difference is not None and not discard_outdated:
            raise InputError(f"{working}: unfinished output of a run with another {difference}; finish or remove it")
        if difference is not None:
            _remove(working)
        working.mkdir(exist_ok=True)
        (working / MANIFEST_NAME).unlink(missing_ok=True)  # killed between the manifest and the rename
        write_atomic(working / INPUTS_NAME, json.dumps(recorded, indent=1))
        yield working
        _finish(working, path, kind, inputs, provenance)
        # Only after the rename: a working folder without its inputs could not be resumed.
        (path / INPUTS_NAME).unlink()


def read_manifest(path: Path, kind: str) -> Manifest:
    """The manifest of the artifact at `path`, after checking every file's size and every small file's content.

    Raises:
        InputError: no such folder, no manifest (half-written), another kind or schema, or a missing or changed file.
    """
    if not path.is_dir():
        raise InputError(f"{path}: no such output folder ({kind} expected)")
    try:
        data = json.loads((path / MANIFEST_NAME).read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: no {MANIFEST_NAME}: not a finished {kind} folder") from None
    except ValueError as error:
        raise InputError(f"{path / MANIFEST_NAME}: not valid JSON ({error})") from error
    manifest = Manifest.from_data(data, where=str(path / MANIFEST_NAME))
    if manifest.kind != kind:
        raise InputError(f"{path}: holds {manifest.kind}, expected {kind}")
    if manifest.schema_version != SCHEMA_VERSION:
        raise InputError(f"{path}: schema version {manifest.schema_version}, this code reads {SCHEMA_VERSION}")
    for entry in manifest.files:
        _check_file(path / entry.path, entry)
    return manifest


def file_hash(file: Path) -> str:
    """SHA-256, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def is_current(path: Path, kind: str, inputs: Mapping[str, Any]) -> bool:
    """Whether `path` is a complete artifact of this kind made from exactly these inputs."""
    try:
        return read_manifest(path, kind).inputs_digest == digest(_as_json(inputs))
    except InputError:
        return False


def input_difference(manifest: Manifest, inputs: Mapping[str, Any]) -> Difference | None:
    """Where an artifact was made from something else than these inputs; None if it was made from them."""
    return _first_difference(manifest.inputs, _as_json(inputs))


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file so that `path` holds its old or its new content at any time, never a part.

    Raises:
        InputError: the disk is full; `path` is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _disk_full_named(path):
        try:
            with temporary.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def is_disk_full(error: BaseException) -> bool:
    """Whether `error` says that the disk or the quota is exhausted.

    safetensors reports it by text alone, hence the second test.
    """
    by_number = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return by_number or "No space left on device" in str(error)


@contextmanager
def _disk_full_named(path: Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise InputError(f"{path}: no space left on the disk") from error
        raise


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Hold the lock of the artifact at `path`; the kernel releases it when a process is killed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise InputError(f"{path}: cannot create its folder ({error.strerror})") from error
    lock_path = _sibling(path, "lock")
    try:
        lock = _lock(lock_path)
    except BlockingIOError:
        raise InputError(f"{path}: another process is writing it") from None
    with lock:
        try:
            yield
        finally:
            lock_path.unlink(missing_ok=True)


def _lock(path: Path) -> IO[str]:
    """The locked file at `path`. Raises BlockingIOError if another process has it."""
    while True:
        lock = path.open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            lock.close()
            raise
        # Its last owner may have removed it since it was opened: then others would lock a new one beside it.
        if _is_at(path, lock):
            return lock
        lock.close()


def _is_at(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _sibling(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.name}.{suffix}")


def _check_replaceable(path: Path) -> None:
    """Refuse to replace what we did not write: `path` comes from a recipe and may be mistyped."""
    if not path.exists():
        return
    if not path.is_dir() or (any(path.iterdir()) and not (path / MANIFEST_NAME).exists()):
        raise InputError(f"{path}: exists and is not an output folder of ours; move it away or choose another output")


def _difference_to_partial(working: Path, recorded: Mapping[str, Any]) -> str | None:
    """The first dotted key in which a working folder's inputs differ; None if it can be used."""
    if not working.exists() or not any(working.iterdir()):
        return None
    try:
        found = json.loads((working / INPUTS_NAME).read_text())
    except (FileNotFoundError, ValueError):
        return INPUTS_NAME
    difference = _first_difference(found, recorded)
    return None if difference is None else difference.key


def _first_difference(found: Any, wanted: Any, prefix: str = "") -> Difference | None:
    if found == wanted:
        return None
    if not (isinstance(found, dict) and isinstance(wanted, dict)):
        return Difference(prefix, found, wanted)
    key = next(key for key in sorted(found | wanted) if found.get(key, ABSENT) != wanted.get(key, ABSENT))
    return _first_difference(found.get(key, ABSENT), wanted.get(key, ABSENT), f"{prefix}.{key}" if prefix else key)


def _finish(working: Path, path: Path, kind: str, inputs: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
    """Write the manifest and rename the working folder to `path`, replacing an older artifact."""
    ours = (working / MANIFEST_NAME, working / INPUTS_NAME)
    files = sorted(file for file in working.rglob("*") if file.is_file() and file not in ours)
    manifest = Manifest(
        kind=kind,
        schema_version=SCHEMA_VERSION,
        inputs_digest=digest(_as_json(inputs)),
        inputs=_as_json(inputs),
        provenance=_as_json(provenance),
        files=tuple(_describe(file, working) for file in files),
    )
    write_atomic(working / MANIFEST_NAME, manifest.model_dump_json(indent=1))
    outdated = _sibling(path, "outdated")
    _remove(outdated)
    if path.exists():
        path.rename(outdated)  # a folder that is not empty cannot be replaced in one step
    working.rename(path)
    _remove(outdated)


def _describe(file: Path, folder: Path) -> FileEntry:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())  # the manifest must not reach the disk before what it vouches for
    size = file.stat().st_size
    recorded = size <= HASHED_BYTES or file.suffix == WEIGHTS_SUFFIX
    sha256 = file_hash(file) if recorded else None
    return FileEntry(path=file.relative_to(folder).as_posix(), num_bytes=size, sha256=sha256)


def _check_file(file: Path, entry: FileEntry) -> None:
    if not file.is_file():
        raise InputError(f"{file}: listed in {MANIFEST_NAME} but missing")
    if file.stat().st_size != entry.num_bytes:
        raise InputError(f"{file}: has {file.stat().st_size} bytes, {MANIFEST_NAME} says {entry.num_bytes}")
    if entry.sha256 is not None and entry.num_bytes <= HASHED_BYTES and file_hash(file) != entry.sha256:
        raise InputError(f"{file}: content changed since it was written (SHA-256 differs)")


def _as_json(data: Mapping[str, Any]) -> dict[str, Any]:
    """`data` as it reads back from JSON (tuples become lists), so that comparisons hold across a restart."""
    plain: dict[str, Any] = json.loads(json.dumps(data))
    return plain


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
