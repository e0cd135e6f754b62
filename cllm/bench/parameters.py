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
    return weight_count(shape_of(*checkpoint(model, recipe)))


def trained_parameters(method: MethodConfig, model: SubjectName, recipe: Recipe) -> int | None:
    """What was trained on top of the teacher for a model and a method.

    All weights of the CLLM or its adapters, and those of the method's draft model or heads, with the model that was
    trained with them; 0 for the teacher by itself. None where somebody else trained the draft and its files are not
    here.
    """
    found = placed(method, recipe, model)
    total = 0
    if found.own_model or model == "cllm":
        shape, lora = shape_of(found.path, found.revision), None if found.own_model else recipe.train.lora
        total = weight_count(shape) if lora is None else _adapters(lora, tensor_shapes(shape))
    if not isinstance(found.method, VllmMethod) or found.method.draft is None:
        return total
    draft = stored_parameters(found.method.draft)
    return None if draft is None else total + draft


def shape_of(path: str, revision: str | None) -> ModelShape:
    """Of a checkpoint's model, from its configuration."""
    return ModelShape.of(AutoConfig.from_pretrained(path, revision=revision))


def weight_count(shape: ModelShape) -> int:
    """All of a model's numbers; tied embeddings count once."""
    return sum(math.prod(sizes) for sizes in tensor_shapes(shape).values())


def stored_parameters(checkpoint: str) -> int | None:
    """All numbers in a checkpoint's files; None if there are none here."""
    total = 0
    for file in Path(checkpoint).glob("*.safetensors"):
        with safe_open(file, framework="numpy") as opened:
            total += sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
    return total or None


def _adapters(lora: LoraConfig, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """A pair of matrices, rank × inputs and outputs × rank, for each layer that is adapted."""
    adapted = [
        shape for name, shape in shapes.items() if name.split(".")[-2] in lora.target_modules and len(shape) == 2
    ]
    return sum(lora.rank * (outputs + inputs) for outputs, inputs in adapted)
