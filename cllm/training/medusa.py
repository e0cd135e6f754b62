"""Medusa heads (arXiv 2401.10774): head k predicts, from the last hidden state of token t, token t + k + 1.

Medusa-1 trains the heads on the frozen teacher; Medusa-2 trains the teacher with them, by the AR loss as well.
Parameters are named as vLLM's Medusa model names them, so that the heads' state is its checkpoint.

Shapes: R rows, L row length, N = R * L, T tokens that bear an AR loss, E hidden size, V vocabulary.
"""

import json
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import PreTrainedModel

from cllm.recipe import OptimConfig
from cllm.training.forward import hidden_states_RLE, output_head
from cllm.training.losses import LossSums, ar_loss_T
from cllm.training.objective import Objective, count_responses
from cllm.training.optim import adamw
from cllm.training.packing import PackedRows

_IGNORED = -100  # the label that cross_entropy leaves out


class ResidualBlock(torch.nn.Module):
    """x + SiLU(Wx + b); with W and b zero the identity."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(hidden_size, hidden_size)])

    def forward(self, x_TE: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x_TE = x_TE + F.silu(layer(x_TE))
        return x_TE


class MedusaHeads(torch.nn.Module):
    """`num_heads` heads, each a residual block and an output projection of its own."""

    def __init__(self, hidden_size: int, vocab_size: int, num_heads: int) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([ResidualBlock(hidden_size) for _ in range(num_heads)])
        self.lm_heads = torch.nn.ModuleList(
            [torch.nn.Linear(hidden_size, vocab_size, bias=False) for _ in range(num_heads)]
        )

    @staticmethod
    @torch.no_grad()
    def of(model: PreTrainedModel, num_heads: int) -> "MedusaHeads":
        """Heads that all begin as the model's own output projection."""
        weight_VE = output_head(model).weight
        assert isinstance(weight_VE, torch.Tensor)
        vocab_size, hidden_size = weight_VE.shape
        with weight_VE.device:  # the meta device, where the weights come from another worker
            heads = MedusaHeads(hidden_size, vocab_size, num_heads)
        for parameter in heads.blocks.parameters():
            parameter.zero_()
        for parameter in heads.lm_heads.parameters():
            parameter.copy_(weight_VE)
        return heads

    def logits_TV(self, hidden_TE: torch.Tensor, head: int) -> torch.Tensor:
        """Logits of `head` (0-based): from token t for token t + head + 2."""
        return self.lm_heads[head](self.blocks[head](hidden_TE))


class MedusaObjective(Objective):
    """Loss of the heads: sum over k of decay^k times the cross-entropy of head k, and a mean over the tokens of the
    response; a head has no loss where its label lies behind the response's end.

    Args:
        variant: 1 freezes `model`; 2 trains it too.
        model_scale: learning rate of the model over that of the heads (Medusa-2).
    """

    second_loss = "heads"

    def __init__(
        self,
        model: PreTrainedModel,
        heads: MedusaHeads,
        *,
        variant: Literal[1, 2],
        decay: float,
        model_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(variant == 2)
        self.heads = heads
        self.variant = variant
        self.decay = decay
        self.model_scale = model_scale

    count_labels = staticmethod(count_responses)

    @property
    def trained(self) -> torch.nn.Module:
        """The heads alone (Medusa-1), or this module."""
        return self.heads if self.variant == 1 else self

    def train(self, mode: bool = True) -> "MedusaObjective":
        super().train(mode)
        if self.variant == 1:
            self.model.eval()
        return self

    def forward(self, rows: PackedRows) -> LossSums:
        hidden_NE = hidden_states_RLE(self.model, rows).flatten(0, 1)
        hidden_TE, tokens_N = hidden_NE[rows.ar_T], rows.tokens_RL.flatten()
        ar = ar_loss_T(output_head(self.model)(hidden_TE), tokens_N[rows.ar_T + 1]).sum()
        heads = ar.new_zeros(())
        for head in range(len(self.heads.blocks)):
            labels_T = head_labels_T(rows, head)
            logits_TV = self.heads.logits_TV(hidden_TE[: len(labels_T)], head).float()
            loss = F.cross_entropy(logits_TV, labels_T, reduction="sum", ignore_index=_IGNORED)
            heads = heads + self.decay ** (head + 1) * loss
        return LossSums(ar, heads, len(rows.ar_T), len(rows.ar_T))

    def build_optimizers(self, config: OptimConfig) -> list[torch.optim.Optimizer]:
        optimizers: list[torch.optim.Optimizer] = [adamw(list(self.heads.parameters()), config)]
        if self.variant == 2:
            optimizers.append(adamw(list(self.model.parameters()), config))
            for group in optimizers[1].param_groups:
                group["scale"] = self.model_scale
        return optimizers


def head_labels_T(rows: PackedRows, head: int) -> torch.Tensor:
    """Labels of `head` (0-based) at the first of the tokens `rows.ar_T`; the last ones have none.

    No document's last token is in `ar_T`. So token t and its (head + 1)-th successor are of one response exactly if the
    successor's place in `ar_T` is so many behind, which is known without waiting for the GPU.
    """
    ahead = head + 1
    source_T, later_T = rows.ar_T[:-ahead], rows.ar_T[ahead:]
    return rows.tokens_RL.flatten()[later_T + 1].where(later_T == source_T + ahead, _IGNORED)


def save_heads(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Write the state of `MedusaHeads` as a checkpoint that vLLM loads (speculative method medusa)."""
    vocab_size, hidden_size = state["lm_heads.0.weight"].shape
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    config = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": hidden_size,
        "vocab_size": vocab_size,
        "num_heads": sum(name.startswith("lm_heads.") for name in state),
        "num_hidden_layers": 1,
        "medusa_fc_bias": True,
        "dtype": str(state["lm_heads.0.weight"].dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
