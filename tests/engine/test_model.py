"""The engine's model computes what transformers computes, window by window and on several ranks.

Shapes: B rows, L tokens of a row, W window, V vocabulary.
"""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from cllm.engine.attention import TorchAttention
from cllm.engine.model import DecoderModel, ModelShape, Rope, Shard
from cllm.engine.ops import TorchOps
from cllm.engine.weights import model_from_transformers
from cllm.errors import InputError
from tests.engine.paged import SIZES, PagedRows, full_logits, paged_logits, random_tokens, transformers_model

LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 3.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama-tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-biases": lambda: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama-wide-heads": lambda: LlamaConfig(**SIZES, head_dim=12),
    "llama-one-kv-head": lambda: LlamaConfig(**SIZES | {"num_key_value_heads": 1}),
    "llama-linear": lambda: LlamaConfig(**SIZES, rope_parameters=dict(LINEAR)),
    "llama-llama3": lambda: LlamaConfig(**SIZES, rope_parameters=dict(LLAMA3)),
    "llama-yarn": lambda: LlamaConfig(**SIZES, rope_parameters=dict(YARN)),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=None),
    "mistral-window-of-the-context": lambda: MistralConfig(**SIZES, sliding_window=64),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen2-yarn": lambda: Qwen2Config(**SIZES, rope_parameters=dict(YARN)),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16),
    "qwen3-biases": lambda: Qwen3Config(**SIZES, head_dim=16, attention_bias=True, tie_word_embeddings=True),
}


def assert_same_logits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_windows_in_steps_give_the_logits_of_transformers(name: str) -> None:
    reference = transformers_model(CONFIGS[name]())
    vocab_size, prompts, length = SIZES["vocab_size"], [11, 5, 8], 24
    tokens_BL = random_tokens((3, length), vocab_size)
    guessed_BL = tokens_BL.clone()
    for row, prompt in enumerate(prompts):  # three right tokens behind the prompt, then wrong ones
        guessed_BL[row, prompt + 3 :] = (tokens_BL[row, prompt + 3 :] + 1) % vocab_size
    rows = PagedRows(model_from_transformers(reference), batch=3, max_tokens=length)

    prefill_BWV = rows.read(tokens_BL[:, : max(prompts)], [0, 0, 0], prompts)
    window_BWV = rows.read(_windows(guessed_BL, prompts, 7), prompts, [7, 7, 7])
    later = [prompt + 3 for prompt in prompts]  # the right tokens overwrite what the wrong ones left in the cache
    later_BWV = rows.read(_windows(tokens_BL, later, 6), later, [6, 6, 6])

    right_BLV, guessed_BLV = full_logits(reference, tokens_BL), full_logits(reference, guessed_BL)
    for row, prompt in enumerate(prompts):
        assert_same_logits(prefill_BWV[row, :prompt], right_BLV[row, :prompt])
        assert_same_logits(window_BWV[row], guessed_BLV[row, prompt : prompt + 7])
        assert_same_logits(later_BWV[row], right_BLV[row, prompt + 3 : prompt + 9])


def _windows(tokens_BL: torch.Tensor, starts: list[int], width: int) -> torch.Tensor:
    return torch.stack([row_L[start : start + width] for row_L, start in zip(tokens_BL, starts, strict=True)])


@pytest.mark.parametrize("rope", [None, LINEAR, LLAMA3, YARN, YARN | {"attention_factor": 1.7}])
def test_rope_table_equals_that_of_transformers(rope: dict[str, object] | None) -> None:
    config = LlamaConfig(**SIZES | {"max_position_embeddings": 4096}, rope_parameters=rope)
    positions_1P = torch.arange(4096)[None]
    cos_1PD, sin_1PD = LlamaRotaryEmbedding(config)(torch.zeros(1), positions_1P)
    table_PD = Rope.of(config, head_size=8).table_PD(4096)
    assert table_PD.dtype == torch.float32
    torch.testing.assert_close(table_PD, torch.cat([cos_1PD[0, :, :4], sin_1PD[0, :, :4]], dim=1), rtol=0, atol=1e-6)


def test_padding_behind_the_last_position_changes_nothing() -> None:
    reference = transformers_model(CONFIGS["llama"]())
    tokens_BL = random_tokens((1, 64), SIZES["vocab_size"])
    rows = PagedRows(model_from_transformers(reference), batch=1, max_tokens=64)
    rows.read(tokens_BL[:, :60], [0], [60])
    window_BW = torch.cat([tokens_BL[:, 60:], torch.zeros(1, 12, dtype=torch.long)], dim=1)
    logits_BWV = rows.read(window_BW, [60], [4])
    assert_same_logits(logits_BWV[:, :4], full_logits(reference, tokens_BL)[:, 60:])


def test_a_forward_reads_nothing_back_from_the_device() -> None:
    """The meta device has shapes and no values: whatever asks for a value, or a shape that depends on one, fails."""
    reference = transformers_model(CONFIGS["qwen3"]())
    torch.nn.Module.to(reference, "meta")
    model = model_from_transformers(reference)
    tokens_BL = torch.empty(2, 5, dtype=torch.long, device="meta")
    assert model.device.type == "meta"
    assert paged_logits(model, tokens_BL).shape == (2, 5, SIZES["vocab_size"])


class SumOfThreads:
    """Sums tensors over the threads that call it with one."""

    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world, timeout=60)
        self.parts: dict[int, torch.Tensor] = {}

    def __call__(self, rank: int, part: torch.Tensor) -> torch.Tensor:
        self.parts[rank] = part
        self.barrier.wait()
        total = sum((self.parts[key] for key in sorted(self.parts)), start=torch.zeros_like(part))
        self.barrier.wait()  # before anybody overwrites a part
        return total


def logits_of_ranks(world: int, make: Callable[..., DecoderModel], tokens_BL: torch.Tensor) -> list[torch.Tensor]:
    """Logits that each of `world` ranks computes; `make` builds the model of a shard."""
    total = SumOfThreads(world)
    logits: dict[int, torch.Tensor] = {}

    def run(rank: int) -> None:
        model = make(shard=Shard(rank, world), all_reduce=lambda part: total(rank, part))
        logits[rank] = paged_logits(model, tokens_BL)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [logits[rank] for rank in range(world)]


@pytest.mark.parametrize("name", ["llama-tied", "llama-biases", "mistral", "qwen2", "qwen3-biases"])
def test_two_ranks_compute_what_one_computes(name: str) -> None:
    reference = transformers_model(CONFIGS[name]())
    tokens_BL = random_tokens((2, 9), SIZES["vocab_size"])
    expected_BLV = full_logits(reference, tokens_BL)
    ranks = logits_of_ranks(2, lambda **options: model_from_transformers(reference, **options), tokens_BL)
    assert torch.equal(*ranks)
    assert_same_logits(ranks[0], expected_BLV)


def test_ranks_share_the_heads_of_the_cache() -> None:
    reference = transformers_model(CONFIGS["llama"]())
    model = model_from_transformers(reference, shard=Shard(1, 2), all_reduce=lambda part: part)
    assert (model.heads.num_queries, model.heads.num_kv, model.heads.size) == (2, 1, 8)
    assert model.shape.num_kv == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [({}, "num_key_value_heads=2"), ({"num_attention_heads": 8, "num_key_value_heads": 4}, "intermediate_size=50")],
)
def test_sizes_that_ranks_cannot_divide_are_refused(changes: dict[str, int], message: str) -> None:
    reference = transformers_model(LlamaConfig(**SIZES | {"intermediate_size": 50} | changes))
    with pytest.raises(InputError, match=message):
        model_from_transformers(reference, shard=Shard(0, 4), all_reduce=lambda part: part)


def test_several_ranks_need_a_sum() -> None:
    model = model_from_transformers(transformers_model(CONFIGS["llama"]()))
    with pytest.raises(InputError, match="all_reduce"):
        DecoderModel(model.shape, model.weights, ops=TorchOps(), attention=TorchAttention(), shard=Shard(0, 2))


@pytest.mark.parametrize(("rank", "world"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_outside_the_world_is_refused(rank: int, world: int) -> None:
    with pytest.raises(InputError, match=f"rank {rank}"):
        Shard(rank, world)


def test_shape_holds_the_sizes_of_a_configuration() -> None:
    shape = ModelShape.of(Qwen3Config(**SIZES, head_dim=16))
    assert (shape.num_queries, shape.num_kv, shape.head_size) == (4, 2, 16)
    assert (shape.vocab_size, shape.hidden_size, shape.intermediate_size, shape.num_layers) == (40, 32, 48, 3)
    assert (shape.max_positions, shape.norm_eps, shape.tied_embeddings) == (64, 1e-6, False)
    assert shape == ModelShape.of(Qwen3Config(**SIZES, head_dim=16))
    assert ModelShape.of(Qwen3Config(**SIZES), max_positions=17).max_positions == 17


SLIDING_LAYERS: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "factor": 2.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPT2Config(), "architecture gpt2"),
        (LlamaConfig(**SIZES, architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"),
        (LlamaConfig(**SIZES, architectures=["MistralForCausalLM"]), r"MistralForCausalLM \(model type llama\)"),
        (LlamaConfig(**SIZES, hidden_act="gelu"), "hidden_act 'gelu'"),
        (LlamaConfig(**SIZES | {"quantization_config": {"quant_method": "gptq"}}), "quantization_config"),
        (LlamaConfig(**SIZES | {"num_key_value_heads": 3}), "num_attention_heads=4"),
        (LlamaConfig(**SIZES, rope_parameters=dict(DYNAMIC)), "rope_type 'dynamic'"),
        (LlamaConfig(**SIZES, rope_parameters=dict(LONG)), "rope_type 'longrope'"),
        (LlamaConfig(**SIZES, rope_parameters=LINEAR | {"partial_rotary_factor": 0.5}), "2 frequencies"),
        (MistralConfig(**SIZES, sliding_window=63), "context of 64 tokens exceeds .* window of 63"),
        (Qwen2Config(**SIZES, **SLIDING_LAYERS), "context of 64 tokens exceeds .* window of 16"),
        (Qwen3Config(**SIZES, **SLIDING_LAYERS), "context of 64 tokens exceeds .* window of 16"),
    ],
)
def test_what_the_engine_does_not_compute_is_refused_by_name(config: PretrainedConfig, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ModelShape.of(config)


@pytest.mark.parametrize("max_positions", [0, 65])
def test_a_context_that_the_model_does_not_have_is_refused(max_positions: int) -> None:
    with pytest.raises(InputError, match=f"max_positions={max_positions}"):
        ModelShape.of(LlamaConfig(**SIZES), max_positions)


def test_a_sliding_window_is_no_hindrance_where_it_hides_nothing() -> None:
    assert ModelShape.of(MistralConfig(**SIZES, sliding_window=16), max_positions=16).max_positions == 16
    no_layer_slides = SLIDING_LAYERS | {"max_window_layers": 3}
    assert ModelShape.of(Qwen2Config(**SIZES, **no_layer_slides)).max_positions == 64
    assert ModelShape.of(Qwen2Config(**SIZES, sliding_window=16)).max_positions == 64
