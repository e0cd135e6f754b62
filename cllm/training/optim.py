"""AdamW with a warm-up and cosine schedule."""

import math

import torch

from cllm.recipe import OptimConfig


def build_optimizer(model: torch.nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; weight decay spares vectors (norms, biases)."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def learning_rate_at(step: int, config: OptimConfig) -> float:
    """Learning rate of the 0-based `step`: linear warm-up, then a cosine down to its floor at the last step."""
    warmup = max(1, round(config.warmup_ratio * config.steps))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    floor = config.min_learning_rate_ratio
    return config.learning_rate * (floor + (1 - floor) * cosine)
