"""Finds the fastest launches of a model's projections on its GPU.

First each projection by itself, then in place: between the kernels that go before and follow, which start while it ends
and fetch their weights while it computes, another launch may be the best. Measured alone, 16 tokens of a 7B shape had
plans that made the whole step 2% slower than those nobody had measured.

Shapes: T tokens of a forward, C = two a layer (keys and values), N cache blocks, S tokens of a block, K key-value
heads, D head size.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch

from cllm.engine.attention import Windows
from cllm.engine.kernels.plans import Plan, PlanKey
from cllm.engine.kernels.tuning import microseconds
from cllm.engine.model import DecoderModel, Weights
from cllm.engine.ops import Linear, Pages
from cllm.engine.triton_ops import TritonOps

_LAYERS = 8  # of a forward that is measured: their weights are more than any L2 cache holds
_CONTEXT = 256  # tokens before its window
_BLOCK_TOKENS = 16
_TRIED_AGAIN = 4  # of a projection's plans, the fastest ones by themselves

Key = TypeVar("Key", bound=Hashable)
Choice = TypeVar("Choice")


def tune_model(model: DecoderModel, ops: TritonOps, num_tokens: Sequence[int]) -> None:
    """Measure the plans for forwards of these sizes and let `ops`, the model's own, keep the best."""
    layers = model.weights.layers
    measured: dict[PlanKey, dict[Plan | None, float]] = {}
    for op, linears in (
        ("gated_linear", [layer.gate_up for layer in layers]),
        ("linear_add_norm", [layer.down for layer in layers]),
        ("linear", [layer.qkv for layer in layers]),
        ("linear_add_norm", [layer.output for layer in layers]),
    ):
        measured |= ops.tune(op, linears, num_tokens)  # type: ignore[arg-type]  # the names are those of Op
    ops.tune("linear", [model.weights.head], num_tokens)
    for tokens in sorted({key.tokens for key in measured}):
        tries = {
            key: _worth_trying(ops, key, times, model.device) for key, times in measured.items() if key.tokens == tokens
        }
        choose_in_turn(tries, ops.adopt, partial(microseconds, [_forward(model, tokens)]))
    torch.cuda.empty_cache()  # what was allocated for it is the cache's


def choose_in_turn(
    choices: Mapping[Key, Iterable[Choice]],
    adopt: Callable[[Key, Choice], None],
    cost: Callable[[], float],
) -> None:
    """Adopt for one key after the other the choice that costs least, given those of the keys before."""
    for key, tried in choices.items():
        costs = []
        for choice in tried:
            adopt(key, choice)
            costs.append((cost(), choice))
        adopt(key, min(costs, key=lambda found: found[0])[1])


def _worth_trying(
    ops: TritonOps, key: PlanKey, times: Mapping[Plan | None, float], device: torch.device
) -> list[Plan | None]:
    possible = [plan for plan, time in times.items() if math.isfinite(time)]
    fastest = sorted(possible, key=times.__getitem__)[:_TRIED_AGAIN]
    return list(dict.fromkeys([*fastest, ops.untried(key, device)]))


def _forward(model: DecoderModel, tokens: int) -> Callable[[], torch.Tensor]:
    """A forward of the model's first layers: one row with a window of T tokens."""
    layers = model.weights.layers[:_LAYERS]
    weights = Weights(model.weights.embedding_VE, layers, model.weights.norm, Linear(model.weights.head.weight_OI))
    part = DecoderModel(model.shape, weights, ops=model.ops, attention=model.attention)
    blocks = -(-(_CONTEXT + tokens) // _BLOCK_TOKENS)
    cache_CNSKD = torch.zeros(
        (2 * len(layers), 1 + blocks, _BLOCK_TOKENS, model.heads.num_kv, model.heads.size),
        dtype=model.dtype,
        device=model.device,
    )
    cache = [Pages(keys_NSKD, values_NSKD) for keys_NSKD, values_NSKD in cache_CNSKD.unflatten(0, (-1, 2))]
    positions_T = _CONTEXT + torch.arange(tokens, device=model.device)
    windows = Windows(
        torch.full((1,), _CONTEXT, dtype=torch.int32, device=model.device),
        1 + torch.arange(blocks, dtype=torch.int32, device=model.device)[None],
        tokens,
    )
    return lambda: part.hidden_TE(
        torch.zeros_like(positions_T), positions_T, positions_T + _BLOCK_TOKENS, windows, cache
    )
