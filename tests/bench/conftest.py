"""One tiny run for all tests of the matrix."""

from pathlib import Path

import pytest

from cllm.bench.matrix import MatrixRecipe
from cllm.recipe import Recipe
from tests.bench.runs import make_scored_run, matrix_over


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Tests work on copies."""
    return make_scored_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def matrix(tiny_run: Recipe, tmp_path: Path) -> MatrixRecipe:
    return matrix_over(tiny_run, tmp_path / "results")
