"""The engine's decoder-only model: the layers of Llama, Mistral, Qwen2 and Qwen3 over a paged cache, and nothing else.

A forward reads windows of tokens, writes their keys and values to the cache and returns hidden states. It never waits
for the device and its shapes follow from those of its arguments, so a CUDA graph can hold it.

Tensor parallelism: every rank computes its share of the heads and of the intermediate size; the products behind them
(attention output, MLP down) are sums over the ranks. Embedding and head are whole on every rank: gathering the logits
of all window tokens would cost about the time that reading a part of the head saves, and tied embeddings stay one
tensor.

Shapes: T tokens of a forward, R rows of hidden states to be read, E hidden size, V vocabulary, C channels of query, key
and value together (of this rank), F intermediate size (of this rank), H query heads (of this rank), D head size,
P positions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from cllm.engine.attention import Attention, Windows
from cllm.engine.ops import Heads, Linear, Norm, Ops, Pages
from cllm.errors import InputError

AllReduce = Callable[[torch.Tensor], torch.Tensor]
"""Sum of a tensor over all ranks; it may overwrite its argument."""

# Types whose frequencies do not depend on the length that a row has reached: its keys are rotated once.
_SCALED_ROPE = ("linear", "llama3", "yarn")


class _Family(NamedTuple):
    """What a transformers architecture fixes outside its configuration; None: attention_bias decides."""

    model_type: str
    qkv_bias: bool | None
    output_bias: bool | None
    head_norms: bool = False


_FAMILIES = {
    "LlamaForCausalLM": _Family("llama", qkv_bias=None, output_bias=None),
    "MistralForCausalLM": _Family("mistral", qkv_bias=False, output_bias=False),
    "Qwen2ForCausalLM": _Family("qwen2", qkv_bias=True, output_bias=False),
    "Qwen3ForCausalLM": _Family("qwen3", qkv_bias=None, output_bias=None, head_norms=True),
}


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding: D/2 angles per position, and a factor on their cosines and sines (yarn's)."""

    inverse_frequencies: tuple[float, ...]
    scaling: float = 1.0

    @classmethod
    def of(cls, config: PretrainedConfig, head_size: int) -> Self:
        """As transformers computes it.

        Raises:
            InputError: a type of scaling that depends on the running length, or one that leaves part of a head out.
        """
        parameters = config.rope_parameters or {}
        kind = parameters.get("rope_type")
        if kind == "default":
            exponents = torch.arange(0, head_size, 2, dtype=torch.float) / head_size
            frequencies, scaling = 1.0 / (parameters["rope_theta"] ** exponents), 1.0
        elif kind in _SCALED_ROPE:
            frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        else:
            raise InputError(f"rope_type {kind!r} is not supported; supported: default, {', '.join(_SCALED_ROPE)}")
        if 2 * len(frequencies) != head_size:
            raise InputError(f"rope_parameters: {len(frequencies)} frequencies for heads of size {head_size}")
        return cls(tuple(frequencies.tolist()), scaling)

    def table_PD(self, num_positions: int) -> torch.Tensor:
        """Cosines in the first D/2 columns and sines in the others, float32, on the CPU."""
        positions_P1 = torch.arange(num_positions, dtype=torch.float32)[:, None]
        angles_PX = positions_P1 * torch.tensor(self.inverse_frequencies, dtype=torch.float32)
        return torch.cat([angles_PX.cos(), angles_PX.sin()], dim=1) * self.scaling


@dataclass(frozen=True, slots=True)
class ModelShape:
    """All that a model's arithmetic depends on besides its weights. Sizes are those of the whole model."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_queries: int
    num_kv: int
    head_size: int
    max_positions: int
    norm_eps: float
    tied_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    head_norms: bool
    rope: Rope

    @classmethod
    def of(cls, config: PretrainedConfig, max_positions: int | None = None) -> Self:
        """The shape of a transformers model.

        Args:
            max_positions: longest context that will be used; None: the model's.

        Raises:
            InputError: an architecture or a setting that the engine does not compute, named.
        """
        family = _family(config)
        context = config.max_position_embeddings if max_positions is None else max_positions
        _check_settings(config, context)
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        attention_bias = bool(getattr(config, "attention_bias", False))
        return cls(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_queries=config.num_attention_heads,
            num_kv=config.num_key_value_heads,
            head_size=head_size,
            max_positions=context,
            norm_eps=config.rms_norm_eps,
            tied_embeddings=config.tie_word_embeddings,
            qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
            output_bias=attention_bias if family.output_bias is None else family.output_bias,
            mlp_bias=family.model_type == "llama" and bool(config.mlp_bias),
            head_norms=family.head_norms,
            rope=Rope.of(config, head_size),
        )


def _family(config: PretrainedConfig) -> _Family:
    by_type = {family.model_type: name for name, family in _FAMILIES.items()}
    # a configuration that was never saved names no architecture
    name = (config.architectures or [by_type.get(config.model_type, config.model_type)])[0]
    family = _FAMILIES.get(name)
    if family is None or family.model_type != config.model_type:
        raise InputError(
            f"architecture {name} (model type {config.model_type}) is not supported; supported: {', '.join(_FAMILIES)}"
        )
    return family


def _check_settings(config: PretrainedConfig, context: int) -> None:
    if config.hidden_act != "silu":
        raise InputError(f"hidden_act {config.hidden_act!r} is not supported; supported: silu")
    if getattr(config, "quantization_config", None) is not None:
        raise InputError("quantization_config: quantized checkpoints are not supported; load the original weights")
    if config.num_attention_heads % config.num_key_value_heads:
        raise InputError(
            f"num_attention_heads={config.num_attention_heads} is not a multiple of "
            f"num_key_value_heads={config.num_key_value_heads}"
        )
    if not 1 <= context <= config.max_position_embeddings:
        raise InputError(
            f"max_positions={context} is outside 1 to max_position_embeddings={config.max_position_embeddings}"
        )
    window = _sliding_window(config)
    if window is not None and context > window:
        raise InputError(
            f"context of {context} tokens exceeds the model's sliding attention window of {window}: lower max_positions"
        )


def _sliding_window(config: PretrainedConfig) -> int | None:
    """The shortest attention span of a layer, None if all see everything; transformers' Llama knows none."""
    if config.model_type == "mistral":
        return config.sliding_window
    limited = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if config.model_type == "llama" or not limited:
        return None
    if limited != {"sliding_attention"} or config.sliding_window is None:
        raise InputError(f"layer_types: {', '.join(sorted(limited))} is not supported")
    return config.sliding_window


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of a model a process holds.

    Raises:
        InputError: no such rank.
    """

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise InputError(f"rank {self.rank} is not one of {self.world} ranks")

    def check_divides(self, shape: ModelShape) -> None:
        """Raise InputError if the ranks cannot hold equal shares."""
        for name, size in (("num_key_value_heads", shape.num_kv), ("intermediate_size", shape.intermediate_size)):
            if size % self.world:
                raise InputError(f"{name}={size} cannot be divided among {self.world} ranks")

    def heads(self, shape: ModelShape) -> Heads:
        """Sizes of a layer's heads on this rank."""
        return Heads(shape.num_queries // self.world, shape.num_kv // self.world, shape.head_size)


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer's weights, of one rank.

    Attributes:
        output: bias on rank 0 only, as the ranks' products are summed; the same holds for `down`.
    """

    attention_norm: Norm
    qkv: Linear
    heads: Heads
    output: Linear
    mlp_norm: Norm
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class Weights:
    """All weights of one rank; with tied embeddings the head's is the embedding's tensor."""

    embedding_VE: torch.Tensor
    layers: tuple[Layer, ...]
    norm: Norm
    head: Linear


class DecoderModel:
    """Computes hidden states and logits; holds no state of requests, so one model serves many caches.

    Args:
        weights: of this rank, on the device where the model shall run.
        all_reduce: needed with more than one rank.

    Attributes:
        shape: of the whole model.
        heads: sizes of one layer's heads on this rank; a cache has `heads.num_kv` of `heads.size`.
        device: of the weights.
        dtype: of hidden states, logits and the cache.

    Raises:
        InputError: several ranks without `all_reduce`.
    """

    def __init__(
        self,
        shape: ModelShape,
        weights: Weights,
        *,
        ops: Ops,
        attention: Attention,
        shard: Shard | None = None,
        all_reduce: AllReduce | None = None,
    ) -> None:
        shard = shard or Shard()
        if shard.world > 1 and all_reduce is None:
            raise InputError(f"a model on {shard.world} ranks needs all_reduce")
        self.shape = shape
        self.weights = weights
        self.ops = ops
        self.attention = attention
        self.heads = shard.heads(shape)
        self.device = weights.embedding_VE.device
        self.dtype = weights.embedding_VE.dtype
        self.cos_sin_PD = shape.rope.table_PD(shape.max_positions).to(self.device)
        self._all_reduce = all_reduce if shard.world > 1 else None

    def hidden_TE(
        self,
        tokens_T: torch.Tensor,
        positions_T: torch.Tensor,
        slots_T: torch.Tensor,
        windows: Windows,
        cache: Sequence[Pages],
    ) -> torch.Tensor:
        """Hidden states behind the final norm, [T, E] in `dtype`; the tokens' keys and values are in the cache then.

        Args:
            tokens_T: int64 ids, row by row.
            positions_T: int64. Padding may stand behind `max_positions`; nobody may read its hidden states.
            slots_T: int64 places in the cache, as in `Ops.rotate_and_store`.
            windows: the same tokens as rows.
            cache: one entry a layer.
        """
        layers = self.weights.layers
        windows = self.attention.prepare(windows, self.heads.num_queries, cache[0])
        positions_T = positions_T.clamp_max(self.shape.max_positions - 1)
        residual_TE = self.weights.embedding_VE[tokens_T]  # F.embedding takes 6 times as long for 2 to 16 tokens
        normed_TE = self.ops.norm(residual_TE, layers[0].attention_norm)
        next_norms = [*(layer.attention_norm for layer in layers[1:]), self.weights.norm]
        for layer, next_norm, pages in zip(layers, next_norms, cache, strict=True):
            qkv_TC = self.ops.linear(normed_TE, layer.qkv)
            q_THD = self.ops.rotate_and_store(qkv_TC, layer.heads, positions_T, self.cos_sin_PD, pages, slots_T)
            mixed_TC = self.attention(q_THD, pages, windows).flatten(1)
            normed_TE, residual_TE = self._sum_norm(mixed_TC, layer.output, residual_TE, layer.mlp_norm)
            gated_TF = self.ops.gated_linear(normed_TE, layer.gate_up)
            normed_TE, residual_TE = self._sum_norm(gated_TF, layer.down, residual_TE, next_norm)
        return normed_TE

    def logits_RV(self, hidden_RE: torch.Tensor) -> torch.Tensor:
        """Logits of hidden states, [R, V] in `dtype`; the same on every rank."""
        return self.ops.linear(hidden_RE, self.weights.head)

    def _sum_norm(
        self, x_TI: torch.Tensor, linear: Linear, residual_TE: torch.Tensor, norm: Norm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`Ops.linear_add_norm` of a linear layer whose inputs are divided among the ranks."""
        if self._all_reduce is None:
            return self.ops.linear_add_norm(x_TI, linear, residual_TE, norm)
        return self.ops.add_norm(self._all_reduce(self.ops.linear(x_TI, linear)), residual_TE, norm)
