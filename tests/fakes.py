"""Tiny random models for tests: real transformers classes, no download, float32 on the CPU."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedModel, Qwen2Config, Qwen3Config

FAMILIES = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
EOS, PAD = 1, 0


def tiny_model(
    seed: int = 0, *, family: str = "llama", vocab_size: int = 24, layers: int = 2, hidden: int = 32, scale: float = 0.3
) -> PreTrainedModel:
    """A random model whose logits are spread widely enough that float32 rounding never decides an argmax."""
    torch.manual_seed(seed)
    config = FAMILIES[family](
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=256,
        initializer_range=scale,
        eos_token_id=EOS,
        pad_token_id=PAD,
        bos_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
