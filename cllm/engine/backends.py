"""The fastest implementation that a machine has."""

import importlib.util
from collections.abc import Sequence

import torch

from cllm.engine.attention import Attention, TorchAttention
from cllm.engine.flash_attention import DTYPES, FlashAttention3
from cllm.engine.model import DecoderModel
from cllm.engine.ops import Ops, TorchOps


def tune(model: DecoderModel, num_tokens: Sequence[int]) -> None:
    """Let the model's operations find their fastest launches for forwards of these sizes, where they have a choice.

    Takes a minute or two on a GPU; call it before an engine is built.
    """
    if model.device.type != "cuda":
        return
    from cllm.engine.triton_ops import TritonOps

    if not isinstance(model.ops, TritonOps):
        return
    layers = model.weights.layers
    model.ops.tune("linear", [layer.qkv for layer in layers], num_tokens)
    model.ops.tune("linear_add_norm", [layer.output for layer in layers], num_tokens)
    model.ops.tune("gated_linear", [layer.gate_up for layer in layers], num_tokens)
    model.ops.tune("linear_add_norm", [layer.down for layer in layers], num_tokens)
    model.ops.tune("linear", [model.weights.head], num_tokens)


def ops_for(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Ops:
    """Our Triton kernels on a GPU in bfloat16, else plain torch."""
    if device.type == "cuda" and dtype == torch.bfloat16 and importlib.util.find_spec("triton") is not None:
        from cllm.engine.triton_ops import TritonOps

        return TritonOps()
    return TorchOps()


def attention_for(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Attention:
    """FlashAttention-3 where it runs (with our kernel for masks), else our Triton kernel on a GPU, else plain torch.

    Args:
        dtype: of queries, keys and values.
    """
    has_triton = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    if dtype in DTYPES and FlashAttention3.available(device):
        return FlashAttention3(device, masked=triton_attention(device) if has_triton else None)
    return triton_attention(device) if has_triton else TorchAttention()


def triton_attention(device: torch.device) -> Attention:
    """Our Triton kernel; Triton comes with torch for GPUs, so it is imported where one is."""
    from cllm.engine.triton_attention import TritonAttention

    return TritonAttention(device)
