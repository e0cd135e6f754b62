"""What holds for all tests.

Without a GPU, Triton's kernels run on its interpreter. Triton reads the variable when it is first imported, and vLLM
imports it as well, so it is set before any test module is.

`make test` runs two processes: one has the tests that start a Ray or a server on this machine, one after the other, the
other one the rest.
"""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

_TESTS = Path(__file__).parent
_WHOLE_MACHINE = {"cluster", "jobs", "serving"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        package = item.path.relative_to(_TESTS).parts[0]
        is_alone = package in _WHOLE_MACHINE or item.get_closest_marker("ray") is not None
        item.add_marker(pytest.mark.xdist_group("machine" if is_alone else "rest"))
