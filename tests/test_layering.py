"""The layers: `cllm` knows nothing of Ray or HTTP; `jobs` and `serving` use `cllm` and not each other."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = {
    "cllm": {"ray", "fastapi", "starlette", "uvicorn", "jobs", "serving", "tests"},
    "jobs": {"serving", "tests"},
    "serving": {"jobs", "tests"},
}


def imported_packages(source: str) -> Iterator[tuple[int, str]]:
    """Line and top-level package of every import, those inside functions included; relative imports stay inside."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module.partition(".")[0]


def violations(source: str, layer: str) -> list[tuple[int, str]]:
    return [(line, package) for line, package in imported_packages(source) if package in FORBIDDEN[layer]]


@pytest.mark.parametrize("layer", sorted(FORBIDDEN))
def test_layer_imports_nothing_from_above(layer: str) -> None:
    files = sorted((ROOT / layer).rglob("*.py"))
    found = {str(file.relative_to(ROOT)): violations(file.read_text(), layer) for file in files}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_the_library_is_not_empty() -> None:
    """Guards the test above against looking in the wrong folder."""
    assert len(list((ROOT / "cllm").rglob("*.py"))) > 10


@pytest.mark.parametrize(
    "source", ["import ray", "import os, ray.data", "from ray import data", "def f():\n    from jobs.cli import main"]
)
def test_violations_are_found(source: str) -> None:
    assert violations(source, "cllm")
    assert not violations("from . import ray\nimport raycast\nfrom cllm import errors", "cllm")
