"""The operations of a decoder layer, cut where a GPU kernel can fuse them; here in plain torch.

This is the readable twin of `cllm.engine.triton_ops`, and what a CPU runs. Weights lie as in a checkpoint, [out, in],
with query, key and value rows stacked into one matrix and gate and up rows into another.

Shapes: T tokens of a forward, E hidden size, I inputs and O outputs of a linear layer, F intermediate size, C channels
of query, key and value together, H query heads, K key-value heads, D head size, N cache blocks, S tokens of a block,
P positions.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F


@dataclass(frozen=True, slots=True)
class Linear:
    """Weight [O, I] and bias [O] of a linear layer."""

    weight_OI: torch.Tensor
    bias_O: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Norm:
    """Weight [size] and epsilon of an RMS norm."""

    weight: torch.Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class Heads:
    """How the stacked projection divides into heads, and the norms of Qwen3's queries and keys."""

    num_queries: int  # H
    num_kv: int  # K
    size: int  # D
    query_norm: Norm | None = None
    key_norm: Norm | None = None


@dataclass(frozen=True, slots=True)
class Pages:
    """One layer's keys and values, both [N, S, K, D]; block 0 takes the writes of tokens that nobody reads."""

    keys_NSKD: torch.Tensor
    values_NSKD: torch.Tensor


class Ops(Protocol):
    """What a decoder layer computes. Every implementation gives what `TorchOps` gives, up to rounding."""

    def norm(self, x_TE: torch.Tensor, norm: Norm) -> torch.Tensor:
        """RMS norm over the last dimension."""

    def linear(self, x_TI: torch.Tensor, linear: Linear) -> torch.Tensor:
        """x W^T + b, [T, O]."""

    def add_norm(self, x_TE: torch.Tensor, residual_TE: torch.Tensor, norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
        """(normed, sum): sum = residual + x, the new residual; both [T, E]."""

    def linear_add_norm(
        self, x_TI: torch.Tensor, linear: Linear, residual_TE: torch.Tensor, norm: Norm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(normed, sum): sum = residual + linear(x), the new residual; both [T, E]."""

    def gated_linear(self, x_TE: torch.Tensor, gate_up: Linear) -> torch.Tensor:
        """silu(gate(x)) * up(x), [T, F]; the first F rows of the weight are the gate's."""

    def rotate_and_store(
        self,
        qkv_TC: torch.Tensor,
        heads: Heads,
        positions_T: torch.Tensor,
        cos_sin_PD: torch.Tensor,
        pages: Pages,
        slots_T: torch.Tensor,
    ) -> torch.Tensor:
        """Norm (where the model has one) and rotate queries and keys, store keys and values; queries, [T, H, D].

        Args:
            positions_T: int64 position of each token.
            cos_sin_PD: float32; the first D/2 columns are cosines, the others sines (a head's two halves are a pair).
            slots_T: int64 place of each token in the pages: block * S + offset. Several tokens may share a slot of
                block 0.
        """


class TorchOps:
    """The operations in plain torch, in the order and precision of transformers' modules."""

    def norm(self, x_TE: torch.Tensor, norm: Norm) -> torch.Tensor:
        x = x_TE.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps)
        return norm.weight * x.to(x_TE.dtype)

    def linear(self, x_TI: torch.Tensor, linear: Linear) -> torch.Tensor:
        return F.linear(x_TI, linear.weight_OI, linear.bias_O)

    def add_norm(self, x_TE: torch.Tensor, residual_TE: torch.Tensor, norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
        total_TE = residual_TE + x_TE
        return self.norm(total_TE, norm), total_TE

    def linear_add_norm(
        self, x_TI: torch.Tensor, linear: Linear, residual_TE: torch.Tensor, norm: Norm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.add_norm(self.linear(x_TI, linear), residual_TE, norm)

    def gated_linear(self, x_TE: torch.Tensor, gate_up: Linear) -> torch.Tensor:
        gate_TF, up_TF = self.linear(x_TE, gate_up).chunk(2, dim=-1)
        return F.silu(gate_TF) * up_TF

    def rotate_and_store(
        self,
        qkv_TC: torch.Tensor,
        heads: Heads,
        positions_T: torch.Tensor,
        cos_sin_PD: torch.Tensor,
        pages: Pages,
        slots_T: torch.Tensor,
    ) -> torch.Tensor:
        sizes = [heads.num_queries * heads.size, heads.num_kv * heads.size, heads.num_kv * heads.size]
        q_TC, k_TC, v_TC = qkv_TC.split(sizes, dim=-1)
        q_THD, k_TKD = q_TC.unflatten(-1, (-1, heads.size)), k_TC.unflatten(-1, (-1, heads.size))
        if heads.query_norm is not None and heads.key_norm is not None:
            q_THD, k_TKD = self.norm(q_THD, heads.query_norm), self.norm(k_TKD, heads.key_norm)
        cos_sin_TD = cos_sin_PD[positions_T].to(qkv_TC.dtype)
        cos_T1D, sin_T1D = (half.repeat(1, 2)[:, None] for half in cos_sin_TD.chunk(2, -1))
        pages.keys_NSKD.view(-1, heads.num_kv, heads.size)[slots_T] = _rotate(k_TKD, cos_T1D, sin_T1D)
        pages.values_NSKD.view(-1, heads.num_kv, heads.size)[slots_T] = v_TC.unflatten(-1, (-1, heads.size))
        return _rotate(q_THD, cos_T1D, sin_T1D)


def _rotate(x_TXD: torch.Tensor, cos_T1D: torch.Tensor, sin_T1D: torch.Tensor) -> torch.Tensor:
    first, second = x_TXD.chunk(2, dim=-1)
    return x_TXD * cos_T1D + torch.cat((-second, first), dim=-1) * sin_T1D
