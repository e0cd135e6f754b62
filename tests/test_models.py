"""What identifies a checkpoint: content in a folder, the commit on the hub."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cllm.artifacts import HASHED_BYTES, read_manifest, write_artifact
from cllm.models import weights_revision
from tests.fakes import tiny_model

ROOT = Path(__file__).resolve().parents[1]
COMMITS = ("1" * 40, "2" * 40)


def cached_model(cache: Path) -> Path:
    """Two commits of a model as a download leaves them; returns the file that says where its branch main is."""
    for commit in COMMITS:
        snapshot = cache / "models--team--teacher" / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}")
    branch = cache / "models--team--teacher" / "refs" / "main"
    branch.parent.mkdir()
    return branch


def revision_offline(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, because the library reads these variables when it is imported."""
    program = "import sys; from cllm.models import weights_revision; print(weights_revision(*sys.argv[1:]))"
    environment = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_a_moved_branch_is_another_model(tmp_path: Path) -> None:
    branch = cached_model(tmp_path)
    for commit in COMMITS:
        branch.write_text(commit)
        done = revision_offline(tmp_path, "team/teacher")
        assert done.stdout == f"team/teacher@{commit}\n", done.stderr
    pinned = revision_offline(tmp_path, "team/teacher", COMMITS[0])
    assert pinned.stdout == f"team/teacher@{COMMITS[0]}\n"


def test_a_model_that_is_nowhere_is_named(tmp_path: Path) -> None:
    done = revision_offline(tmp_path, "team/nosuch")
    assert "InputError: team/nosuch: neither a folder nor a model on the hub: " in done.stderr.splitlines()[-1]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Weights of a finished stage, larger than what is hashed at each reading."""
    with write_artifact(tmp_path / "teacher", kind="teacher", inputs={}, provenance={}) as folder:
        tiny_model(hidden=160, layers=3).save_pretrained(folder)
    return tmp_path / "teacher" / "model.safetensors"


def test_the_manifest_carries_the_hash_of_weights(weights: Path) -> None:
    folder, content = weights.parent, weights.read_bytes()
    assert len(content) > HASHED_BYTES
    found = weights_revision(str(folder))
    (folder / "manifest.json").rename(folder / "aside")
    assert weights_revision(str(folder)) == found  # what reading the weights gives
    (folder / "aside").rename(folder / "manifest.json")
    entry = next(file for file in read_manifest(folder, "teacher").files if file.path == weights.name)
    assert entry.sha256 is not None
    written = weights.stat()
    weights.write_bytes(bytes(len(content)))
    os.utime(weights, ns=(written.st_atime_ns, written.st_mtime_ns))
    assert weights_revision(str(folder)) == found  # so the weights were not read


def test_weights_changed_in_place_are_another_model(weights: Path) -> None:
    found = weights_revision(str(weights.parent))
    weights.write_bytes(bytes(weights.stat().st_size))
    assert weights_revision(str(weights.parent)) != found
