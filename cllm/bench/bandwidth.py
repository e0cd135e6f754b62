"""The floor of a decoding step: reading the weights once at the speed at which the device copies memory."""

import math
import time

import torch
from transformers import PretrainedConfig

from cllm.engine.model import DecoderModel, ModelShape
from cllm.engine.weights import tensor_shapes

_COPY_BYTES = {"cuda": 4 << 30, "cpu": 256 << 20}


def copy_bandwidth(device: torch.device, repeats: int = 5) -> float:
    """Bytes a second of a large copy within the device, counting those read and those written; the fastest repeat."""
    size = _copy_bytes(device)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(repeats + 1):
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * size / (time.perf_counter() - start))
    return best


def _copy_bytes(device: torch.device) -> int:
    """A size that caches do not help with, and that leaves a half of a GPU's free memory alone."""
    if device.type != "cuda":
        return _COPY_BYTES[device.type]
    free, _ = torch.cuda.mem_get_info(device)
    return min(_COPY_BYTES[device.type], free // 4)


def weight_bytes(model: DecoderModel) -> int:
    """Bytes of all matrices that a step reads: those of the layers and the vocabulary projection."""
    weights = model.weights
    linears = [weights.head]
    for layer in weights.layers:
        linears += [layer.qkv, layer.output, layer.gate_up, layer.down]
    return sum(linear.weight_OI.numel() * linear.weight_OI.element_size() for linear in linears)


def weight_bytes_of(config: PretrainedConfig) -> int:
    """The same from a configuration, for 16-bit weights: all matrices but the embedding, which is only looked up."""
    shapes = tensor_shapes(ModelShape.of(config))
    if not any(name.startswith("lm_head") for name in shapes):
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return 2 * sum(math.prod(s) for name, s in shapes.items() if len(s) == 2 and "embed_tokens" not in name)
