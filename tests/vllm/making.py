"""Tiny checkpoints that vLLM loads on a CPU, and requests for them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from cllm.decoding.records import DecodeRequest, SamplingParams
from tests.fakes import tiny_model

VOCAB, HIDDEN = 64, 128  # vLLM's attention on CPUs has no heads smaller than 32
PROMPTS = ((3, 4, 5, 6), (7, 8, 9), tuple(range(2, 30)), (5, 6, 5, 6, 5))


@contextmanager
def vllm_in_process() -> Iterator[None]:
    """vLLM's engine in the test's own process, by the model runner that CPUs have."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_USE_V2_MODEL_RUNNER"):
            patch.setenv(name, "0")
        patch.setenv("VLLM_NO_USAGE_STATS", "1")
        yield


def make_model(folder: Path, seed: int = 0, *, family: str = "llama", layers: int = 2) -> PreTrainedModel:
    """A random model, saved."""
    model = tiny_model(seed, family=family, vocab_size=VOCAB, hidden=HIDDEN, layers=layers)
    model.save_pretrained(folder)
    return model


def make_medusa(folder: Path, *, heads: int = 3, hidden: int = HIDDEN, vocab_size: int = VOCAB) -> None:
    """Random Medusa heads, in the layout that vLLM loads."""
    folder.mkdir()
    torch.manual_seed(0)
    weights = {}
    for head in range(heads):
        weights[f"blocks.{head}.layers.0.weight"] = 0.1 * torch.randn(hidden, hidden)
        weights[f"lm_heads.{head}.weight"] = torch.randn(vocab_size, hidden)
    save_file(weights, folder / "model.safetensors")
    config = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": hidden,
        "vocab_size": vocab_size,
        "num_heads": heads,
        "num_hidden_layers": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))


def make_eagle3(folder: Path, target: PreTrainedModel) -> None:
    """A random EAGLE-3 head over two layers of `target`, in the layout of its authors, which vLLM loads."""
    folder.mkdir()
    torch.manual_seed(0)
    config, hidden, inner = target.config, HIDDEN, 2 * HIDDEN
    sizes = {
        "fc": (hidden, 2 * hidden),
        "midlayer.self_attn.q_proj": (hidden, 2 * hidden),  # of the token's embedding beside the hidden state
        "midlayer.self_attn.k_proj": (config.num_key_value_heads * config.head_dim, 2 * hidden),
        "midlayer.self_attn.v_proj": (config.num_key_value_heads * config.head_dim, 2 * hidden),
        "midlayer.self_attn.o_proj": (hidden, hidden),
        "midlayer.mlp.gate_proj": (inner, hidden),
        "midlayer.mlp.up_proj": (inner, hidden),
        "midlayer.mlp.down_proj": (hidden, inner),
        "lm_head": (VOCAB, hidden),
    }
    norms = ("norm", *(f"midlayer.{name}" for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm")))
    weights = {f"{name}.weight": 0.1 * torch.randn(size) for name, size in sizes.items()}
    save_file(weights | {f"{name}.weight": torch.ones(hidden) for name in norms}, folder / "model.safetensors")
    settings = {
        **config.to_diff_dict(),
        "architectures": ["LlamaForCausalLMEagle3"],
        "intermediate_size": inner,
        "num_hidden_layers": 1,
        "draft_vocab_size": VOCAB,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2], "use_aux_hidden_state": True},
    }
    (folder / "config.json").write_text(json.dumps(settings))


def requests(count: int = 20, **sampling: object) -> list[DecodeRequest]:
    """One for each of PROMPTS, to be decoded to full length."""
    params = SamplingParams(ignore_eos=True, **sampling)  # type: ignore[arg-type]
    return [DecodeRequest(prompt, count, params) for prompt in PROMPTS]


@torch.inference_mode()
def greedy(model: PreTrainedModel, request: DecodeRequest) -> tuple[int, ...]:
    """transformers' greedy answer, without a cache."""
    tokens = list(request.prompt_ids)
    for _ in range(request.max_new_tokens):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tuple(tokens[len(request.prompt_ids) :])
