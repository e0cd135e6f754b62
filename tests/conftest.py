"""What holds for all tests.

Without a GPU, Triton's kernels run on its interpreter. Triton reads the variable when it is first imported, and vLLM
imports it as well, so it is set before any test module is.

`make test` runs two processes: one has the tests of clusters and jobs, which ask Ray for the whole machine, one after
the other; the other process has the rest.
"""

import os
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

_MACHINE = ("tests/cluster/", "tests/jobs/", "tests/test_cli.py")


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class MachineAndRest(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "machine" if nodeid.startswith(_MACHINE) else "rest"

    return MachineAndRest(config, log)
