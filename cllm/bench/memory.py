"""Memory that decoding by a method needs under a load, computed from sizes, so that engines compare.

What a device has in use says how much an engine reserved: vLLM takes all it may for its cache, ours makes room for as
many requests as the largest load has.
"""

import torch
from transformers import AutoConfig

from cllm.bench.drafts import Placed
from cllm.bench.methods import JacobiMethod, LookaheadMethod, MethodConfig, Room, VllmMethod
from cllm.bench.parameters import shape_of, stored_parameters, weight_count
from cllm.engine.model import ModelShape


def memory_needed(found: Placed, room: Room, dtype: torch.dtype) -> int | None:
    """Bytes of weights, those of draft or heads included, and of the keys and values of `room`, over all GPUs.

    Activations, graphs and buffers are left out: they are small beside these at the batch sizes of decoding. None where
    others keep the draft and its size is not known.
    """
    shape = shape_of(found.path, found.revision)
    tokens = room.rows * (room.tokens + guesses_of(found.method))
    draft = _draft_numbers(found.method, shape, tokens)
    if draft is None:
        return None
    return (weight_count(shape) + tokens * _numbers_a_token(shape) + draft) * dtype.itemsize


def guesses_of(method: MethodConfig) -> int:
    """Most tokens beyond the seed that a step reads for a row: each has a place in the cache while it does."""
    if isinstance(method, JacobiMethod):
        return method.window - 1
    if isinstance(method, LookaheadMethod):
        return method.window * (method.ngram - 1) + method.candidates * (method.ngram - 1)
    return method.guesses if isinstance(method, VllmMethod) and method.method != "ar" else 0


def _draft_numbers(method: MethodConfig, target: ModelShape, tokens: int) -> int | None:
    """Weights, keys and values of the draft model or heads; heads read the target's hidden states and keep nothing."""
    if not isinstance(method, VllmMethod) or method.draft is None:
        return 0
    weights = stored_parameters(method.draft)
    if weights is None or method.method == "medusa":
        return weights
    if method.method == "eagle3":  # one layer of the target's shape
        return weights + tokens * _numbers_a_token(target) // target.num_layers
    return weights + tokens * _numbers_a_token(ModelShape.of(AutoConfig.from_pretrained(method.draft)))


def _numbers_a_token(shape: ModelShape) -> int:
    """Keys and values of one token over all layers."""
    return 2 * shape.num_layers * shape.num_kv * shape.head_size
