"""Optimisers and their warm-up and cosine schedule."""

import math

import torch
from transformers import PreTrainedModel

from cllm.recipe import OptimConfig


def build_optimizers(model: PreTrainedModel, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """Optimisers that together cover the trainable parameters, each once; weight decay spares vectors (norms, biases).

    Muon takes the decoder layers' matrices and scales its updates to AdamW's, so that one learning rate serves both.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if config.optimizer == "adamw":
        return [adamw(list(trainable.values()), config)]
    in_layers = f"{model.base_model_prefix}.layers."
    matrices = [p for name, p in trainable.items() if name.startswith(in_layers) and p.dim() == 2]
    chosen = set(map(id, matrices))
    others = [p for p in trainable.values() if id(p) not in chosen]
    muon = torch.optim.Muon(
        matrices, lr=config.learning_rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, adamw(others, config)]


def adamw(parameters: list[torch.nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW for `parameters`, without weight decay for vectors."""
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
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
