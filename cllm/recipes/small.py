"""Placeholder: the settings of `debug`."""

from cllm.recipe import Recipe
from cllm.recipes.debug import debug


def gsm8k_small() -> Recipe:
    """Placeholder."""
    return debug().model_copy(update={"name": "gsm8k-small", "output": "runs/gsm8k-small"})


def spider_small() -> Recipe:
    """Placeholder."""
    return debug().model_copy(update={"name": "spider-small", "output": "runs/spider-small"})
