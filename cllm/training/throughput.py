"""Training speed: tokens a second, and model FLOPs utilisation where the hardware's peak is known."""

import time

import torch

from cllm.training.worker import Worker

# Dense bf16 peak in FLOP/s by datasheet, looked up by a part of the device's name.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L40S": 362e12}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of the GPU in FLOP/s; None for a CPU or an unknown GPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


class Throughput:
    """Counts tokens between measurements. MFU takes 6 FLOPs a parameter and token, attention left out."""

    def __init__(self, model: torch.nn.Module, worker: Worker) -> None:
        self.flops_per_token = 6 * sum(parameter.numel() for parameter in model.parameters()) * worker.world
        self.peak = peak_flops(worker.device)
        self.worker = worker
        self._tokens = 0
        self._since = time.perf_counter()

    def add(self, num_tokens: int) -> None:
        self._tokens += num_tokens

    def measure(self) -> dict[str, float]:
        """Tokens per second (all workers) since the last call, and MFU where it means something."""
        now = time.perf_counter()
        rate = self._tokens / max(1e-9, now - self._since)
        self._tokens, self._since = 0, now
        values = {"tokens_per_s": rate}
        if self.peak is not None:
            values["mfu"] = rate * self.flops_per_token / (self.peak * self.worker.world)
        return values
