"""What the engine benchmark measures: a checkpoint or random weights of a known shape, and requests for it.

Shapes: B requests, L tokens of a prompt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from cllm.decoding.records import DecodeRequest, SamplingParams
from cllm.engine.attention import Attention, TorchAttention
from cllm.engine.backends import attention_for, ops_for, triton_attention
from cllm.engine.flash_attention import FlashAttention3
from cllm.engine.model import DecoderModel
from cllm.engine.parallel import Group
from cllm.engine.weights import ModelOptions, load_model, random_model
from cllm.models import eos_token_ids, load_generation_config, load_tokenizer, pad_token_id
from cllm.tasks.prompts import draw_prompts

AttentionName = Literal["auto", "flash", "triton", "torch"]

SHAPES: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "llama-2-7b": {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
        },
        "tiny": {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 512,
        },
    }
)


class OpenedModel(NamedTuple):
    """A model in memory, the tokens that end a response, and the one that fills up."""

    model: DecoderModel
    eos_ids: Sequence[int]
    pad_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSubject:
    """A model and its requests.

    Attributes:
        path: checkpoint, a folder or a Hugging Face id; None: random weights of `shape`.
        shape: a key of `SHAPES`.
        prompts: prompts.parquet of a run, of which test prompts are drawn; None: random prompts.
        num_prompts: drawn, or made.
        prompt_tokens: of random prompts.
        new_tokens: of a response, at most; a response to random prompts has as many.
        attention: "auto" is the best that the machine has.
    """

    path: str | None
    shape: str | None
    prompts: Path | None
    num_prompts: int
    prompt_tokens: int
    new_tokens: int
    attention: AttentionName = "auto"

    @property
    def name(self) -> str:
        return self.shape or Path(str(self.path)).name

    def config(self) -> PretrainedConfig:
        if self.path is not None:
            config: PretrainedConfig = AutoConfig.from_pretrained(self.path)
            return config
        sizes: dict[str, Any] = dict(SHAPES[str(self.shape)])
        return LlamaConfig(**sizes, dtype="bfloat16", architectures=["LlamaForCausalLM"])

    def open(self, dtype: torch.dtype, device: torch.device, group: Group | None = None) -> OpenedModel:
        """The model, or this process's part of it.

        Raises:
            InputError: no usable checkpoint, or one that cannot be divided so.
        """
        options: ModelOptions = {"ops": ops_for(device, dtype), "attention": self._attention(dtype, device)}
        if group is not None:
            options |= {"shard": group.shard, "all_reduce": group.all_reduce}
        if self.path is None:
            return OpenedModel(random_model(self.config(), dtype, device, **options), (), 0)
        tokenizer = load_tokenizer(self.path)
        eos_ids = eos_token_ids(load_generation_config(self.path), tokenizer)
        return OpenedModel(load_model(self.path, dtype, device, **options), eos_ids, pad_token_id(tokenizer))

    def requests(self, vocab_size: int) -> list[DecodeRequest]:
        """Test prompts by hashed id, which end where the model ends them; or random ones of fixed length."""
        if self.prompts is not None:
            drawn = draw_prompts(self.prompts, "test", self.num_prompts)
            return [DecodeRequest(prompt.prompt_ids, self.new_tokens) for prompt in drawn]
        generator = torch.Generator().manual_seed(0)
        tokens_BL = torch.randint(vocab_size, (self.num_prompts, self.prompt_tokens), generator=generator)
        endless = SamplingParams(ignore_eos=True)
        return [DecodeRequest(tuple(row), self.new_tokens, endless) for row in tokens_BL.tolist()]

    def _attention(self, dtype: torch.dtype, device: torch.device) -> Attention:
        if self.attention == "flash":
            return FlashAttention3(device)
        if self.attention == "torch":
            return TorchAttention()
        return triton_attention(device) if self.attention == "triton" else attention_for(device, dtype)
