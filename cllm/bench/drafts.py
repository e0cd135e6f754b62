"""What a method loads in a run: a model, and the draft model or heads that the run trained (`jobs/baselines.py`).

Medusa-2 trains the teacher together with the heads, which fit no other model, so it brings a model of its own.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from cllm.bench.methods import MethodConfig, VllmMethod
from cllm.config import digest
from cllm.errors import InputError
from cllm.evaluation.subject import SubjectName, checkpoint
from cllm.layout import RunLayout
from cllm.models import weights_revision
from cllm.recipe import Recipe
from cllm.training.baselines import MEDUSA_MODEL

RUN_DRAFT = "run"


@dataclass(frozen=True, slots=True)
class Placed:
    """A method with the checkpoints that it decodes with.

    Attributes:
        method: its draft is a checkpoint, no longer "run".
        path, revision: of the model: a folder or Hugging Face id.
        own_model: the model was trained with the heads; it is neither the run's teacher nor its CLLM.
    """

    method: MethodConfig
    path: str
    revision: str | None = None
    own_model: bool = False


def placed(method: MethodConfig, recipe: Recipe, model: SubjectName) -> Placed:
    """Where the method finds what it loads for a model of the run.

    Raises:
        InputError: the run has not trained what the method asks for, or not for this model.
    """
    found = Placed(method, *checkpoint(model, recipe))
    if not isinstance(method, VllmMethod) or method.draft != RUN_DRAFT:
        return found
    layout = RunLayout.of(recipe)
    folders = {"draft_model": layout.draft, "medusa": layout.medusa}
    if method.method not in folders:
        raise InputError(f"draft: runs train none for vLLM's method {method.method}; name a checkpoint")
    if method.method == "medusa" and model != "teacher":
        raise InputError("the run's Medusa heads read the hidden states of its teacher")
    folder = folders[method.method]
    found = replace(found, method=method.model_copy(update={"draft": str(_trained(folder))}))
    if method.method != "medusa" or not trains_the_teacher(recipe):
        return found
    return replace(found, path=str(_trained(folder / MEDUSA_MODEL)), revision=None, own_model=True)


def trains_the_teacher(recipe: Recipe) -> bool:
    """Whether the run's Medusa heads are those of Medusa-2."""
    section = recipe.baselines.medusa if recipe.baselines else None
    return section is not None and section.variant == 2


def draft_weights(found: Placed) -> str | None:
    """What identifies the weights of the method's draft, and of the model that comes with it; None without a draft."""
    method = found.method
    if not isinstance(method, VllmMethod) or method.draft is None:
        return None
    draft = weights_revision(method.draft)
    return digest([draft, weights_revision(found.path)]) if found.own_model else draft


def _trained(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: not trained yet; run jobs/baselines.py")
    return folder
