"""Provenance says what is needed to repeat a run and nothing about the machine's owner."""

import json
import platform
import socket
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch

from cllm import provenance
from cllm.provenance import collect_provenance


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(
        ["git", "-c", "user.name=t", "-c", "user.email=t@example.com", *arguments],
        cwd=folder,
        check=True,
        capture_output=True,
    )


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository that tracks a stand-in for the module's file."""
    monkeypatch.setattr(provenance, "_ROOT", tmp_path)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "module.py"))
    monkeypatch.delenv("CLLM_COMMIT", raising=False)
    (tmp_path / "module.py").write_text("")
    git(tmp_path, "init")
    return tmp_path


def test_commit_and_dirty_flag_come_from_git(checkout: Path) -> None:
    git(checkout, "add", ".")
    git(checkout, "commit", "-m", "first")
    clean = collect_provenance([])
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (checkout / "module.py").write_text("changed")
    assert collect_provenance([])["dirty"] is True


def test_a_copy_that_git_does_not_track_takes_the_variable(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert collect_provenance([])["commit"] == "unknown"
    monkeypatch.setenv("CLLM_COMMIT", "f00d")
    assert (collect_provenance([])["commit"], collect_provenance([])["dirty"]) == ("f00d", None)


def test_versions_hardware_and_time() -> None:
    found = collect_provenance(["train.py"])
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["torch"] == torch.__version__
    assert found["hardware"]["cores"] > 0
    assert found["hardware"]["memory_gib"] > 0
    assert len(found["hardware"]["gpus"]) == torch.cuda.device_count()
    assert abs(datetime.now(UTC) - datetime.fromisoformat(found["time"])) < timedelta(minutes=5)
    assert json.loads(json.dumps(found)) == found


def test_local_paths_and_host_stay_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home = tmp_path / "home" / "ada"
    monkeypatch.setenv("HOME", str(home))
    root = Path(__file__).resolve().parents[1]
    found = collect_provenance([f"{root}/jobs/train.py", "--set", f"output={home}/runs", f"{home}2/x", "a/b"])
    assert found["command"] == ["jobs/train.py", "--set", "output=~/runs", f"{home}2/x", "a/b"]
    assert socket.gethostname() not in json.dumps(found)
