"""How many parameters models, draft models and heads have, read from their files: nothing is loaded."""

import math
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from transformers import AutoConfig

from cllm.bench.drafts import placed
from cllm.bench.methods import MethodConfig, VllmMethod
from cllm.engine.model import ModelShape
from cllm.engine.weights import tensor_shapes
from cllm.evaluation.subject import SubjectName, checkpoint
from cllm.recipe import LoraConfig, Recipe


def model_parameters(model: SubjectName, recipe: Recipe) -> int:
    """Of the teacher or the CLLM; tied embeddings count once."""
    return sum(math.prod(shape) for shape in _shapes(model, recipe).values())


def trained_parameters(method: MethodConfig, model: SubjectName, recipe: Recipe) -> int | None:
    """What was trained on top of the teacher for a model and a method.

    All weights of the CLLM or its adapters, and those of the method's draft model or heads; 0 for the teacher by
    itself. None where somebody else trained the draft and its files are not here.
    """
    total = 0
    if model == "cllm":
        lora = recipe.train.lora
        total = model_parameters(model, recipe) if lora is None else _adapters(lora, _shapes(model, recipe))
    method = placed(method, recipe, model)
    if not isinstance(method, VllmMethod) or method.draft is None:
        return total
    draft = _stored(Path(method.draft))
    return None if draft is None else total + draft


def _shapes(model: SubjectName, recipe: Recipe) -> dict[str, tuple[int, ...]]:
    path, revision = checkpoint(model, recipe)
    return tensor_shapes(ModelShape.of(AutoConfig.from_pretrained(path, revision=revision)))


def _adapters(lora: LoraConfig, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """A pair of matrices, rank × inputs and outputs × rank, for each layer that is adapted."""
    adapted = [
        shape for name, shape in shapes.items() if name.split(".")[-2] in lora.target_modules and len(shape) == 2
    ]
    return sum(lora.rank * (outputs + inputs) for outputs, inputs in adapted)


def _stored(folder: Path) -> int | None:
    """All numbers in a checkpoint's files; None if there are none here."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as opened:
            total += sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
    return total or None
