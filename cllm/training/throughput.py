"""Training speed: tokens a second, and model FLOPs utilisation where the hardware's peak is known."""

import time
from collections.abc import Callable

import torch

from cllm.training.objective import Objective

# Dense bf16 peak in FLOP/s by datasheet, looked up by a part of the device's name.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L40S": 362e12}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of the GPU in FLOP/s; None for a CPU or an unknown GPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def training_flops(objective: Objective) -> int:
    """FLOPs of one packed token in training: 6 a trained parameter; 4 a frozen one that the gradient passes on its way
    to others; 2 one of a model without gradient. Not counted are attention, and what is computed twice to save memory.
    """
    flops: dict[int, int] = {}
    for model in objective.models:
        frozen = 4 if any(parameter.requires_grad for parameter in model.parameters()) else 2
        flops |= {id(parameter): 6 if parameter.requires_grad else frozen for parameter in model.parameters()}
    # Sharded parameters have the size of the whole; heads are of no model.
    return sum(flops.get(id(parameter), 6) * parameter.numel() for parameter in objective.parameters())


class Throughput:
    """Counts training steps between measurements.

    Args:
        peak: FLOP/s of one worker's device; None: unknown, there is no MFU.
        clock: seconds.
    """

    def __init__(
        self,
        objective: Objective,
        num_workers: int,
        peak: float | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._flops = training_flops(objective)
        self._refinement_flops = 2 * sum(parameter.numel() for parameter in objective.model.parameters())
        self._peak = None if peak is None else peak * num_workers
        self._clock = clock
        self._since = clock()
        self._tokens = 0
        self._total_flops = 0

    def add(self, num_tokens: int, refinements: int) -> None:
        """Count a step: packed tokens of all workers, and forward passes of them that refined their states."""
        self._tokens += num_tokens
        self._total_flops += num_tokens * (self._flops + refinements * self._refinement_flops)

    def measure(self) -> dict[str, float]:
        """Tokens per second (all workers) since the last call, and the share of the peak where that is known."""
        now = self._clock()
        seconds = max(1e-9, now - self._since)
        values = {"tokens_per_s": self._tokens / seconds}
        if self._peak is not None:
            values["mfu"] = self._total_flops / seconds / self._peak
        self._tokens, self._total_flops, self._since = 0, 0, now
        return values
