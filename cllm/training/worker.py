"""Which of the training processes this is."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """This process among those that train together. `rank` of `world` processes, each with one device."""

    device: torch.device
    rank: int = 0
    world: int = 1
