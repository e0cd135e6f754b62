"""Output folders: whole or absent, checked on reading, resumable after a kill."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest

from cllm.artifacts import (
    ABSENT,
    HASHED_BYTES,
    MANIFEST_NAME,
    Difference,
    input_difference,
    is_current,
    read_manifest,
    resumable_artifact,
    write_artifact,
    write_atomic,
)
from cllm.errors import InputError

INPUTS = {"recipe": {"block_size": 16, "sizes": (1, 2)}, "teacher": "abc"}
PROVENANCE = {"commit": "unknown"}


def make(path: Path, inputs: dict[str, Any] = INPUTS, content: str = "rows") -> None:
    with write_artifact(path, kind="prompts", inputs=inputs, provenance=PROVENANCE) as folder:
        (folder / "part").mkdir()
        (folder / "part" / "rows.txt").write_text(content)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def run_until_killed(work: Callable[[Path], None], path: Path) -> None:
    """Run `work`, which kills its own process, in a child."""
    process = multiprocessing.get_context("fork").Process(target=work, args=(path,))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_manifest_lists_every_file_and_reads_back(tmp_path: Path) -> None:
    make(tmp_path / "out")
    manifest = read_manifest(tmp_path / "out", "prompts")
    assert [(file.path, file.num_bytes) for file in manifest.files] == [("part/rows.txt", 4)]
    assert manifest.inputs == {"recipe": {"block_size": 16, "sizes": [1, 2]}, "teacher": "abc"}
    assert manifest.provenance == PROVENANCE
    assert names(tmp_path) == ["out"]


def test_is_current_compares_kind_and_inputs(tmp_path: Path) -> None:
    path = tmp_path / "out"
    assert not is_current(path, "prompts", INPUTS)
    make(path)
    assert is_current(path, "prompts", INPUTS)
    assert not is_current(path, "trajectories", INPUTS)
    assert not is_current(path, "prompts", INPUTS | {"teacher": "other"})


@pytest.mark.parametrize(
    ("inputs", "difference"),
    [
        (INPUTS, None),
        (INPUTS | {"recipe": {"block_size": 8, "sizes": (1, 2)}}, Difference("recipe.block_size", 16, 8)),
        (INPUTS | {"seed": 0}, Difference("seed", ABSENT, 0)),
        ({"recipe": INPUTS["recipe"]}, Difference("teacher", "abc", ABSENT)),
        (INPUTS | {"recipe": None}, Difference("recipe", {"block_size": 16, "sizes": [1, 2]}, None)),
    ],
)
def test_first_difference_of_inputs_is_named(
    tmp_path: Path, inputs: dict[str, Any], difference: Difference | None
) -> None:
    make(tmp_path / "out")
    assert input_difference(read_manifest(tmp_path / "out", "prompts"), inputs) == difference


def test_exception_leaves_nothing_and_keeps_the_older_artifact(tmp_path: Path) -> None:
    def fail() -> None:
        with write_artifact(tmp_path / "out", kind="prompts", inputs={}, provenance={}) as folder:
            (folder / "rows.txt").write_text("half")
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        fail()
    assert names(tmp_path) == []
    make(tmp_path / "out")
    with pytest.raises(RuntimeError, match="interrupted"):
        fail()
    assert names(tmp_path) == ["out"]
    assert is_current(tmp_path / "out", "prompts", INPUTS)


def test_outdated_artifact_is_replaced_whole(tmp_path: Path) -> None:
    make(tmp_path / "out")
    with write_artifact(tmp_path / "out", kind="prompts", inputs={"new": 1}, provenance={}) as folder:
        assert is_current(tmp_path / "out", "prompts", INPUTS)  # the old one stays until the new one is complete
        (folder / "other.txt").write_text("x")
    assert names(tmp_path / "out") == [MANIFEST_NAME, "other.txt"]
    assert names(tmp_path) == ["out"]


def test_killed_writer_leaves_no_artifact_and_does_not_block_the_next(tmp_path: Path) -> None:
    def work(path: Path) -> None:
        with write_artifact(path, kind="prompts", inputs=INPUTS, provenance={}) as folder:
            (folder / "stale.txt").write_text("half")
            die()

    path = tmp_path / "out"
    run_until_killed(work, path)
    with pytest.raises(InputError, match="no such output folder"):
        read_manifest(path, "prompts")
    make(path)
    assert [file.path for file in read_manifest(path, "prompts").files] == ["part/rows.txt"]
    assert names(tmp_path) == ["out"]


def test_foreign_folder_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(InputError, match="not an output folder of ours"):
        make(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"


def test_a_lock_that_its_owner_removed_meanwhile_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a third writer would lock a new file, and both would write."""
    flock, calls = fcntl.flock, []

    def slow_flock(file: IO[str], operation: int) -> None:
        if not calls:  # the owner ends between our opening of the file and our lock
            (tmp_path / "out.lock").unlink()
        calls.append(file)
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", slow_flock)
    with write_artifact(tmp_path / "out", kind="prompts", inputs=INPUTS, provenance={}) as folder:
        (folder / "rows.txt").write_text("first")
        assert len(calls) == 2
        with pytest.raises(InputError, match="another process is writing"):
            make(tmp_path / "out")


def test_second_writer_is_refused_while_the_first_writes(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with write_artifact(path, kind="prompts", inputs=INPUTS, provenance={}) as folder:
        (folder / "rows.txt").write_text("first")
        with pytest.raises(InputError, match="another process is writing"):
            make(path)
    assert (path / "rows.txt").read_text() == "first"


def drop_manifest(folder: Path) -> None:
    (folder / MANIFEST_NAME).unlink()


def truncate_manifest(folder: Path) -> None:
    (folder / MANIFEST_NAME).write_text((folder / MANIFEST_NAME).read_text()[:-10])


def truncate_file(folder: Path) -> None:
    (folder / "part" / "rows.txt").write_text("row")


def change_file(folder: Path) -> None:
    (folder / "part" / "rows.txt").write_text("cols")


def drop_file(folder: Path) -> None:
    (folder / "part" / "rows.txt").unlink()


def raise_schema(folder: Path) -> None:
    data = json.loads((folder / MANIFEST_NAME).read_text())
    (folder / MANIFEST_NAME).write_text(json.dumps(data | {"schema_version": 99}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_manifest, "not a finished prompts folder"),
        (truncate_manifest, "not valid JSON"),
        (truncate_file, r"rows\.txt: has 3 bytes, manifest\.json says 4"),
        (change_file, r"rows\.txt: content changed"),
        (drop_file, r"rows\.txt: listed in manifest\.json but missing"),
        (raise_schema, "schema version 99"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    path = tmp_path / "out"
    make(path)
    damage(path)
    with pytest.raises(InputError, match=message):
        read_manifest(path, "prompts")
    assert not is_current(path, "prompts", INPUTS)


def test_large_files_are_checked_by_size_only(tmp_path: Path) -> None:
    make(tmp_path / "out", content="x" * (HASHED_BYTES + 1))
    (file,) = read_manifest(tmp_path / "out", "prompts").files
    assert file.sha256 is None
    truncate_file(tmp_path / "out")
    with pytest.raises(InputError, match="bytes"):
        read_manifest(tmp_path / "out", "prompts")


def test_resumption_continues_what_a_killed_run_left(tmp_path: Path) -> None:
    def work(path: Path) -> None:
        with resumable_artifact(path, kind="shards", inputs=INPUTS, provenance={}) as folder:
            write_atomic(folder / "0.txt", "first")
            die()

    path = tmp_path / "out"
    run_until_killed(work, path)
    assert not path.exists()
    with resumable_artifact(path, kind="shards", inputs=INPUTS, provenance={}) as folder:
        assert (folder / "0.txt").read_text() == "first"
        write_atomic(folder / "1.txt", "second")
    assert [file.path for file in read_manifest(path, "shards").files] == ["0.txt", "1.txt"]
    assert names(path) == ["0.txt", "1.txt", MANIFEST_NAME]
    assert names(tmp_path) == ["out"]


def test_resumption_with_other_inputs_names_the_key(tmp_path: Path) -> None:
    path = tmp_path / "out"

    def leave_partial() -> None:
        with resumable_artifact(path, kind="shards", inputs=INPUTS, provenance={}) as folder:
            write_atomic(folder / "0.txt", "first")
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        leave_partial()
    other = {"recipe": {"block_size": 32, "sizes": (1, 2)}, "teacher": "abc"}
    with (
        pytest.raises(InputError, match=r"another inputs\.recipe\.block_size"),
        resumable_artifact(path, kind="shards", inputs=other, provenance={}),
    ):
        pytest.fail("must not start")
    assert (tmp_path / "out.partial" / "0.txt").exists()
    with resumable_artifact(path, kind="shards", inputs=other, provenance={}, discard_outdated=True) as folder:
        assert not (folder / "0.txt").exists()
    assert is_current(path, "shards", other)


def test_write_atomic_replaces_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", "old")
    write_atomic(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_full_disk_keeps_the_old_file_and_names_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_atomic(tmp_path / "a", "old")
    monkeypatch.setattr(os, function, full)
    with pytest.raises(InputError, match=rf"{tmp_path}/a: no space left"):
        write_atomic(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize(
    "error", [OSError(errno.EDQUOT, "Disk quota exceeded"), RuntimeError("I/O error: No space left on device (os 28)")]
)
def test_full_disk_inside_an_artifact_is_bad_input_and_leaves_nothing(tmp_path: Path, error: Exception) -> None:
    with (
        pytest.raises(InputError, match=r"out: no space left"),
        write_artifact(tmp_path / "out", kind="prompts", inputs={}, provenance={}),
    ):
        raise error
    assert names(tmp_path) == []


def test_output_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot create its folder"):
        make(tmp_path / "file" / "out")
