"""Energy that a GPU has used, from NVML's counter: all of the GPU's, so nothing else may run on it meanwhile."""

import importlib
from collections.abc import Callable
from typing import Any

import torch

EnergyCounter = Callable[[], float]


def energy_counter(device: torch.device) -> EnergyCounter | None:
    """Reads joules since some moment in the past; None where there is no such counter.

    That is: no GPU, no package nvidia-ml-py, a GPU older than Volta, or a part of one (MIG). The counter advances
    about every 0.1 s, so shorter spans cannot be told.
    """
    if device.type != "cuda":
        return None
    try:
        nvml: Any = importlib.import_module("pynvml")  # optional, and has no types
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        # By its unique id: NVML's numbering does not follow CUDA_VISIBLE_DEVICES.
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except nvml.NVMLError:
        return None
    return lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
