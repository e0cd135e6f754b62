"""The draft models and Medusa heads that runs train (`jobs/baselines.py`), for methods that ask for their own run's."""

from cllm.bench.methods import MethodConfig, VllmMethod
from cllm.errors import InputError
from cllm.evaluation.subject import SubjectName
from cllm.layout import RunLayout
from cllm.models import weights_revision
from cllm.recipe import Recipe

RUN_DRAFT = "run"


def placed(method: MethodConfig, recipe: Recipe, model: SubjectName) -> MethodConfig:
    """The method with the place of the draft model or heads that a run has trained, where it asks for them.

    Raises:
        InputError: the run has trained none, or not for this model.
    """
    if not isinstance(method, VllmMethod) or method.draft != RUN_DRAFT:
        return method
    layout, section = RunLayout.of(recipe), recipe.baselines
    folders = {"draft_model": layout.draft, "medusa": layout.medusa}
    if method.method not in folders:
        raise InputError(f"draft: runs train none for vLLM's method {method.method}; name a checkpoint")
    if method.method == "medusa" and model != "teacher":
        raise InputError("the run's Medusa heads read the hidden states of its teacher")
    if method.method == "medusa" and section is not None and section.medusa and section.medusa.variant != 1:
        raise InputError("the run's Medusa-2 heads belong to the model that was trained with them, not to its teacher")
    folder = folders[method.method]
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: not trained yet; run jobs/baselines.py")
    return method.model_copy(update={"draft": str(folder)})


def draft_weights(method: MethodConfig) -> str | None:
    """What identifies the weights of the method's draft, once it is placed; None for methods without one."""
    if not isinstance(method, VllmMethod) or method.draft is None:
        return None
    return weights_revision(method.draft)
