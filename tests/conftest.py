"""What holds for all tests.

Without a GPU, Triton's kernels run on its interpreter. Triton reads the variable when it is first imported, and vLLM
imports it as well, so it is set before any test module is.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
