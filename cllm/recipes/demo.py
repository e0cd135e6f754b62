"""Placeholder: the settings of `debug`."""

from cllm.recipe import Recipe
from cllm.recipes.debug import debug


def demo() -> Recipe:
    """Placeholder."""
    return debug().model_copy(update={"name": "demo", "output": "runs/demo"})
