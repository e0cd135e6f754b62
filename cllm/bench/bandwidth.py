"""The floor of a decoding step: reading the weights once at the speed at which the device copies memory."""

import time

import torch

from cllm.engine.model import DecoderModel

_COPY_BYTES = {"cuda": 4 << 30, "cpu": 256 << 20}


def copy_bandwidth(device: torch.device, repeats: int = 5) -> float:
    """Bytes a second of a large copy within the device, counting those read and those written; the fastest repeat."""
    size = _COPY_BYTES[device.type]
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


def weight_bytes(model: DecoderModel) -> int:
    """Bytes of all matrices that a step reads: those of the layers and the vocabulary projection."""
    weights = model.weights
    linears = [weights.head]
    for layer in weights.layers:
        linears += [layer.qkv, layer.output, layer.gate_up, layer.down]
    return sum(linear.weight_OI.numel() * linear.weight_OI.element_size() for linear in linears)
