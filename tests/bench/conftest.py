"""One tiny run for all tests of the matrix."""

import pytest

from cllm.recipe import Recipe
from tests.bench.runs import make_scored_run


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Tests work on copies."""
    return make_scored_run(tmp_path_factory.mktemp("run"))
