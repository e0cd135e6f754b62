"""Copies of output folders in a store: whole or absent there, checked on the way back; a run goes on from them."""

import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyarrow.fs import FileSelector, FileSystem

from cllm.artifacts import MANIFEST_NAME, read_manifest, write_artifact
from cllm.errors import InputError
from cllm.recipes import get_recipe
from cllm.storage import Storage
from jobs import stages
from jobs.stages import Stage

INPUTS = {"seed": 0, "sizes": [1, 2]}
PROVENANCE = {"commit": "unknown"}
LARGE = bytes(range(256)) * 8192  # 2 MiB: more than artifacts hash


def make(path: Path, *, number: int = 0, files: int = 3) -> Path:
    inputs = INPUTS | {"seed": number}
    with write_artifact(path, kind="student", inputs=inputs, provenance=PROVENANCE) as folder:
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "vocab.json").write_text(f"{number}")
        (folder / "model.safetensors").write_bytes(LARGE)
        for index in range(files):
            (folder / f"part-{index}").write_text(f"{number}: {index}")
    return path


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    """The address of a server that speaks S3's protocol."""
    moto = pytest.importorskip("moto.server", reason="needs moto[server]")
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"{host}:{port}"
    server.stop()


@pytest.fixture(params=["file", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store with nothing in it."""
    if request.param == "file":
        return f"file://{tmp_path}/store"
    address = request.getfixturevalue("s3_server")
    for name, value in {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    options = f"endpoint_override={address}&scheme=http&region=us-east-1"
    filesystem, _ = FileSystem.from_uri(f"s3://?{options}&allow_bucket_creation=true")
    filesystem.create_dir(bucket := f"runs-{time.monotonic_ns()}")
    return f"s3://{bucket}/mine?{options}"


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stored(storage: Storage) -> set[str]:
    """Names of the files below the root."""
    found = storage.filesystem.get_file_info(FileSelector(storage.root, recursive=True, allow_not_found=True))
    return {info.path.removeprefix(f"{storage.root}/") for info in found if info.is_file}


def test_what_comes_back_is_what_was_put(uri: str, tmp_path: Path) -> None:
    folder, storage = make(tmp_path / "run" / "student"), Storage.open(uri)
    assert storage.manifest("student", "student") is None
    assert storage.put(folder, "student")
    manifest = storage.manifest("student", "student")
    assert manifest == read_manifest(folder, "student")
    storage.get(tmp_path / "other" / "student", manifest)
    assert content(tmp_path / "other" / "student") == content(folder)
    assert read_manifest(tmp_path / "other" / "student", "student") == manifest


def test_the_same_artifact_is_not_copied_twice(uri: str, tmp_path: Path) -> None:
    folder, storage = make(tmp_path / "student"), Storage.open(uri)
    assert storage.put(folder, "student")
    storage.filesystem.delete_file(f"{storage.root}/student/part-0")
    assert not storage.put(folder, "student")
    assert "student/part-0" not in stored(storage)


def test_a_newer_artifact_takes_the_place_of_an_older_one_and_of_nothing_else(uri: str, tmp_path: Path) -> None:
    storage = Storage.open(uri)
    storage.put(make(tmp_path / "student", number=1, files=9), "student")
    with storage.filesystem.open_output_stream(f"{storage.root}/student/notes.txt") as file:
        file.write(b"somebody else's")
    storage.put(make(tmp_path / "student", number=2, files=2), "student")
    listed = {"student/tokenizer/vocab.json", "student/model.safetensors", "student/part-0", "student/part-1"}
    assert stored(storage) == listed | {f"student/{MANIFEST_NAME}", "student/notes.txt"}
    manifest = storage.manifest("student", "student")
    assert manifest is not None
    assert manifest.inputs["seed"] == 2


@pytest.mark.parametrize(
    ("path", "damage", "message"),
    [
        ("part-1", b"0: 7", "SHA-256 differs"),
        ("model.safetensors", LARGE[:-1], "2097151 bytes, manifest.json says 2097152"),
        ("tokenizer/vocab.json", None, "tokenizer/vocab.json"),
    ],
)
def test_a_damaged_copy_is_refused_and_leaves_what_was_here(
    uri: str, tmp_path: Path, path: str, damage: bytes | None, message: str
) -> None:
    storage = Storage.open(uri)
    storage.put(make(tmp_path / "run" / "student", number=2), "student")
    if damage is None:
        storage.filesystem.delete_file(f"{storage.root}/student/{path}")
    else:
        with storage.filesystem.open_output_stream(f"{storage.root}/student/{path}") as file:
            file.write(damage)
    here = make(tmp_path / "here" / "student", number=1)
    before = content(here)
    manifest = storage.manifest("student", "student")
    assert manifest is not None
    with pytest.raises(InputError, match=message):
        storage.get(here, manifest)
    assert content(here) == before
    assert [entry.name for entry in here.parent.iterdir()] == ["student"]


def test_another_kind_under_the_name_is_refused(tmp_path: Path) -> None:
    storage = Storage.open(f"file://{tmp_path}/store")
    storage.put(make(tmp_path / "student"), "student")
    with pytest.raises(InputError, match="holds student, expected teacher"):
        storage.manifest("student", "teacher")


def _put(uri: str, folder: Path) -> None:
    Storage.open(uri).put(folder, "student")


@pytest.mark.parametrize("older", [False, True])
def test_a_killed_upload_leaves_nothing_that_looks_finished(tmp_path: Path, older: bool) -> None:
    storage = Storage.open(uri := f"file://{tmp_path}/store")
    if older:
        storage.put(make(tmp_path / "student", number=1), "student")
    folder = make(tmp_path / "student", number=2, files=2000)
    process = multiprocessing.get_context("spawn").Process(target=_put, args=(uri, folder))
    process.start()
    while not (tmp_path / "store" / "student" / "part-100").exists():  # one of the first, in the order of names
        assert process.is_alive()
    process.kill()
    process.join()
    assert MANIFEST_NAME not in os.listdir(tmp_path / "store" / "student")
    assert storage.manifest("student", "student") is None
    assert storage.put(folder, "student")
    assert storage.manifest("student", "student") == read_manifest(folder, "student")


def test_half_a_manifest_counts_as_none(tmp_path: Path) -> None:
    storage = Storage.open(f"file://{tmp_path}/store")
    storage.put(make(tmp_path / "student"), "student")
    path = tmp_path / "store" / "student" / MANIFEST_NAME
    path.write_text(path.read_text()[:100])
    assert storage.manifest("student", "student") is None


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("ftp://host/run", "storage ftp://host/run: Unrecognized filesystem type"),
        ("file://relative", "storage file://relative"),
    ],
)
def test_a_store_that_cannot_be_opened_is_named(uri: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Storage.open(uri)


@pytest.mark.parametrize(
    ("value", "message"),
    [("bucket/run", "storage is a URI"), ("s3://key:secret@bucket/run", "credentials belong into the environment")],
)
def test_recipes_refuse_other_storages(value: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        get_recipe("debug").with_overrides([f"storage={value}"])


def test_a_missing_bucket_is_one_line(uri: str, tmp_path: Path) -> None:
    if not uri.startswith("s3:"):
        pytest.skip("folders are made")
    missing = uri.replace("s3://runs-", "s3://nosuch-")
    with pytest.raises(InputError, match="storage s3://nosuch-") as caught:
        Storage.open(missing).put(make(tmp_path / "student"), "student")
    assert "\n" not in str(caught.value)


class Making:
    """A stage's work, which counts how often it is done."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.times = stage, 0

    def __call__(self) -> None:
        self.times += 1
        with write_artifact(self.stage.path, kind=self.stage.kind, inputs=self.stage.inputs, provenance={}) as folder:
            (folder / "rows").write_text("rows")


def prompts_stage(output: Path, uri: str, *changes: str) -> Stage:
    return stages.prepare(get_recipe("debug").with_overrides([f"output={output}", f"storage={uri}", *changes]))


def test_a_run_on_another_machine_goes_on_from_the_storage(uri: str, tmp_path: Path) -> None:
    first = Making(prompts_stage(tmp_path / "first", uri))
    stages.skip_if_current(first.stage, first)
    second = Making(prompts_stage(tmp_path / "second", uri))
    stages.skip_if_current(second.stage, second)
    assert (first.times, second.times) == (1, 0)
    assert content(second.stage.path) == content(first.stage.path)


def test_a_stage_that_needs_a_missing_output_fetches_it(uri: str, tmp_path: Path) -> None:
    first = Making(prompts_stage(tmp_path / "first", uri))
    stages.skip_if_current(first.stage, first)
    needed = prompts_stage(tmp_path / "second", uri)
    needed.require()
    assert content(needed.path) == content(first.stage.path)
    with pytest.raises(InputError, match=r"no such output folder .*; run jobs/prepare.py"):
        prompts_stage(tmp_path / "third", f"file://{tmp_path}/empty").require()


def test_outputs_of_another_recipe_are_not_fetched(uri: str, tmp_path: Path) -> None:
    first = Making(prompts_stage(tmp_path / "first", uri))
    stages.skip_if_current(first.stage, first)
    other = Making(prompts_stage(tmp_path / "second", uri, "seed=1"))
    stages.skip_if_current(other.stage, other)
    assert other.times == 1
    copied = json.loads((other.stage.path / MANIFEST_NAME).read_text())
    manifest = Storage.open(uri).manifest("prompts", "prompts")
    assert manifest is not None
    assert manifest.inputs == copied["inputs"]
    assert manifest.inputs["seed"] == 1


def test_a_finished_run_is_copied_when_the_storage_is_named_later(tmp_path: Path) -> None:
    made = Making(prompts_stage(tmp_path / "run", uri := f"file://{tmp_path}/store"))
    made()
    stages.skip_if_current(made.stage, made)
    assert made.times == 1
    assert Storage.open(uri).manifest("prompts", "prompts") == read_manifest(made.stage.path, "prompts")
