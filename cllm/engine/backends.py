"""The fastest implementation that a machine has."""

import importlib.util

import torch

from cllm.engine.attention import Attention, TorchAttention
from cllm.engine.flash_attention import DTYPES, FlashAttention3
from cllm.engine.ops import Ops, TorchOps


def ops_for(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Ops:
    """Our Triton kernels on a GPU in bfloat16, else plain torch."""
    if device.type == "cuda" and dtype == torch.bfloat16 and importlib.util.find_spec("triton") is not None:
        from cllm.engine.triton_ops import TritonOps

        return TritonOps()
    return TorchOps()


def attention_for(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Attention:
    """FlashAttention-3 where it runs, else our Triton kernel on a GPU, else plain torch.

    Args:
        dtype: of queries, keys and values.
    """
    if dtype in DTYPES and FlashAttention3.available(device):
        return FlashAttention3(device)
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from cllm.engine.triton_attention import TritonAttention

        return TritonAttention(device)
    return TorchAttention()
