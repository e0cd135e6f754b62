"""The fastest implementation that a machine has."""

import importlib.util
from collections.abc import Sequence

import torch

from cllm.engine.attention import Attention, TorchAttention
from cllm.engine.flash_attention import DTYPES, FlashAttention3
from cllm.engine.model import DecoderModel
from cllm.engine.ops import Ops, TorchOps
from cllm.engine.state import DeviceState


def tune(model: DecoderModel, num_tokens: Sequence[int]) -> None:
    """Let the model's operations find their fastest launches for forwards of these sizes, where they have a choice.

    Takes a minute or two on a GPU; call it before an engine is built.
    """
    if model.device.type != "cuda":
        return
    from cllm.engine.triton_ops import TritonOps
    from cllm.engine.tuning import tune_model

    if not isinstance(model.ops, TritonOps):
        return
    tune_model(model, model.ops, num_tokens)


def ops_for(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Ops:
    """Our Triton kernels on a GPU in bfloat16, else plain torch."""
    if dtype == torch.bfloat16 and _has_triton(device):
        from cllm.engine.triton_ops import TritonOps

        return TritonOps()
    return TorchOps()


def attention_for(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Attention:
    """FlashAttention-3 where it runs (with our kernel for masks and narrow windows), else our Triton kernel on a GPU,
    else plain torch.

    Args:
        dtype: of queries, keys and values.
    """
    ours = triton_attention(device) if _has_triton(device) else None
    if dtype in DTYPES and FlashAttention3.available(device):
        return FlashAttention3(device, masked=ours, narrow=ours)
    return ours or TorchAttention()


def triton_attention(device: torch.device) -> Attention:
    """Our Triton kernel; Triton comes with torch for GPUs, so it is imported where one is."""
    from cllm.engine.triton_attention import TritonAttention

    return TritonAttention(device)


def state_for(device: torch.device) -> type[DeviceState]:
    """With our Triton kernels on a GPU, else in plain torch."""
    if _has_triton(device):
        from cllm.engine.triton_state import TritonState

        return TritonState
    return DeviceState


def _has_triton(device: torch.device) -> bool:
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None
