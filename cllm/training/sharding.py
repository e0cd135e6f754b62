"""A model over several workers by FSDP2, of which none ever holds the whole one on its device.

Rank 0 has the weights, on the CPU; the others have the model's structure on the meta device (`cllm.models.load_model`
with `empty`). Layer after layer is received from rank 0, and cut into shards before the next one is.
"""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from cllm.training.objective import Objective
from cllm.training.worker import Worker


def shard(objective: Objective, dtype: torch.dtype, worker: Worker) -> None:
    """Shard `objective` in place; every worker must call it. Weights and gradients stay float32, products are `dtype`.

    Every decoder layer is a unit, and the rest (embeddings, norm, output projection) is one with the root.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for model in objective.models:
        for layer in decoder_layers(model):
            receive(layer, worker)
            fully_shard(layer, mp_policy=policy)
    receive(objective, worker)
    fully_shard(objective, mp_policy=policy)


@torch.no_grad()
def receive(module: torch.nn.Module, worker: Worker) -> None:
    """Replace parameters and buffers by rank 0's on the worker's device; what is sharded already stays, tied ones stay
    tied."""
    received: dict[torch.Tensor, torch.Tensor] = {}
    for part in module.modules():
        own = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        for name, tensor in own:
            if isinstance(tensor, DTensor):
                continue
            if tensor not in received:
                received[tensor] = _received(tensor, worker)
            setattr(part, name, received[tensor])


def _received(tensor: torch.Tensor, worker: Worker) -> torch.Tensor:
    has_values = worker.rank == 0
    copy = tensor.detach().to(worker.device) if has_values else torch.empty_like(tensor, device=worker.device)
    dist.broadcast(copy, src=0)
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(copy, requires_grad=tensor.requires_grad)
    return copy


def decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The decoder layers of a model, or of one with adapters put into it."""
    layers = model.base_model.layers
    assert isinstance(layers, torch.nn.ModuleList)
    return layers
