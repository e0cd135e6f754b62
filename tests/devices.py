"""Where kernels are tested: on a GPU, else on the interpreter, and that they compile, which the interpreter hides."""

import os
import subprocess
import sys

import pytest
import torch

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = [
    pytest.param(torch.device("cpu"), marks=interpreted, id="interpreter"),
    pytest.param(torch.device("cuda"), marks=[pytest.mark.gpu, on_gpu], id="gpu"),
]


def assert_compiles(program: str) -> None:
    """Run a program that compiles kernels for a GPU, in a process without the interpreter; no GPU is needed."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
