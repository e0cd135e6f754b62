"""All recipes by name. A recipe is a function that returns a complete `Recipe`; nothing is scanned or read."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from cllm.config import build_named
from cllm.recipe import Recipe
from cllm.recipes import debug, demo, paper, small

RECIPES: Mapping[str, Callable[[], Recipe]] = MappingProxyType(
    {
        "debug": debug.debug,
        "demo": demo.demo,
        "gsm8k-small": small.gsm8k_small,
        "spider-small": small.spider_small,
        "paper-gsm8k": paper.paper_gsm8k,
        "paper-sharegpt": paper.paper_sharegpt,
        "paper-spider": paper.paper_spider,
        "paper-codesearchnet": paper.paper_codesearchnet,
    }
)


def recipe_names() -> tuple[str, ...]:
    """The known names, in the order of the registry."""
    return tuple(RECIPES)


def get_recipe(name: str) -> Recipe:
    """Build the recipe called `name`.

    Raises:
        InputError: no such recipe; the known names are listed.
    """
    return build_named(RECIPES, name, "recipe")
