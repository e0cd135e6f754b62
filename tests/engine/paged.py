"""Reading windows through a paged cache with the engine's model, and models whose every weight matters.

Shapes: B rows, W window, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from cllm.engine.attention import Windows
from cllm.engine.model import DecoderModel
from cllm.engine.ops import Pages

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def transformers_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A float32 model on the CPU; no bias is zero and no norm weight one, as in a trained model."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            torch.nn.init.normal_(weight, mean=1.0 if name.endswith("norm.weight") else 0.0, std=0.3)
    return model


def random_tokens(shape: tuple[int, ...], vocab_size: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def full_logits(model: PreTrainedModel, tokens_BL: torch.Tensor) -> torch.Tensor:
    """Logits of transformers, which reads whole rows: [B, L, V]."""
    return model(input_ids=tokens_BL).logits


class PagedRows:
    """Rows whose blocks lie shuffled in the cache."""

    def __init__(self, model: DecoderModel, batch: int, max_tokens: int, block_tokens: int = 4) -> None:
        self.model = model
        self.block_tokens = block_tokens
        blocks = -(-max_tokens // block_tokens)
        order = 1 + torch.randperm(batch * blocks, generator=torch.Generator().manual_seed(1))
        self.tables_BM = order.view(batch, blocks).to(model.device)
        shape = (1 + batch * blocks, block_tokens, model.heads.num_kv, model.heads.size)
        self.cache = [
            Pages(*(torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in range(2)))
            for _ in range(model.shape.num_layers)
        ]

    @torch.inference_mode()
    def read(self, tokens_BW: torch.Tensor, starts: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """Logits [B, W, V] of windows; what stands behind a row's length is padding, stored in block 0."""
        width, device = tokens_BW.shape[1], self.model.device
        starts_B = torch.tensor(starts, device=device)
        offsets_W = torch.arange(width, device=device)
        positions_BW = starts_B[:, None] + offsets_W
        index_BW = (positions_BW // self.block_tokens).clamp_max(self.tables_BM.shape[1] - 1)
        slots_BW = self.tables_BM.gather(1, index_BW) * self.block_tokens + positions_BW % self.block_tokens
        slots_BW = slots_BW.where(offsets_W < torch.tensor(lengths, device=device)[:, None], 0)
        hidden_TE = self.model.hidden_TE(
            tokens_BW.flatten(),
            positions_BW.flatten(),
            slots_BW.flatten(),
            Windows(starts_B.int(), self.tables_BM.int(), width),
            self.cache,
        )
        return self.model.logits_RV(hidden_TE).unflatten(0, (-1, width))


def paged_logits(model: DecoderModel, tokens_BL: torch.Tensor) -> torch.Tensor:
    """Logits [B, L, V] of whole rows read in one window."""
    batch, length = tokens_BL.shape
    return PagedRows(model, batch, length).read(tokens_BL, [0] * batch, [length] * batch)
