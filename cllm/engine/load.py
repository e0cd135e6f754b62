"""From a checkpoint to an engine: model, size of the cache, step times for the adaptive window."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from cllm.decoding.records import SamplingParams
from cllm.engine.backends import attention_for, ops_for, tune
from cllm.engine.config import EngineConfig
from cllm.engine.costs import CostTable, Work
from cllm.engine.engine import Engine
from cllm.engine.graphs import bucket
from cllm.engine.jacobi import time_steps
from cllm.engine.model import DecoderModel, Shard
from cllm.engine.parallel import Group
from cllm.engine.policy import AdaptiveWindow
from cllm.engine.sampler import DRAW_BYTES
from cllm.engine.weights import load_model
from cllm.errors import InputError
from cllm.models import (
    Precision,
    check_tokenizer_fits,
    context_length,
    default_device,
    eos_token_ids,
    load_generation_config,
    load_tokenizer,
    pad_token_id,
    resolve_dtype,
)

_GRAPH_SHARE = 0.05  # of the GPU's memory, kept for graphs and their workspaces, logits aside
_TYPICAL_CONTEXT = 512  # tokens before a row's window while step times are measured
_SAMPLED: Mapping[Work, SamplingParams] = MappingProxyType(
    {"drawn": SamplingParams(temperature=1.0), "adjusted": SamplingParams(temperature=1.0, top_p=0.9)}
)  # requests that stand for a kind of draw


def load_engine(
    path: str,
    config: EngineConfig,
    *,
    revision: str | None = None,
    precision: Precision = "auto",
    device: torch.device | None = None,
    quantization: Literal["none", "int8"] = "none",
    tokenizer: PreTrainedTokenizerBase | None = None,
    group: Group | None = None,
) -> Engine:
    """An engine for a local folder or Hugging Face id.

    Args:
        tokenizer: that of the prompts; None: the checkpoint's own.
        group: the processes that share the model, each of which calls this; None: this one has all of it.

    Raises:
        InputError: no usable checkpoint or tokenizer, settings that the model cannot keep, or too little memory.
    """
    device = device or default_device()
    tokenizer = tokenizer or load_tokenizer(path, revision)
    dtype = resolve_dtype(precision, device)
    model = load_model(
        path,
        dtype,
        device,
        revision=revision,
        quantization=quantization,
        max_positions=min(config.max_tokens, context_length(path, revision)),
        ops=ops_for(device, dtype),
        attention=attention_for(device, dtype),
        shard=Shard() if group is None else group.shard,
        all_reduce=None if group is None else group.all_reduce,
    )
    check_tokenizer_fits(model.shape.vocab_size, tokenizer, path)
    eos_ids = eos_token_ids(load_generation_config(path, revision), tokenizer)
    pad_id = pad_token_id(tokenizer)
    return build_engine(model, config, eos_ids=eos_ids, pad_id=pad_id, tokenizer=tokenizer, group=group)


def build_engine(
    model: DecoderModel,
    config: EngineConfig,
    *,
    eos_ids: Sequence[int],
    pad_id: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    costs: CostTable | None = None,
    group: Group | None = None,
) -> Engine:
    """An engine over a model in memory. Where asked to, it finds the fastest launches first (`EngineConfig.tune`); with
    policy "adaptive" it times its steps; on a GPU it captures all their graphs (`EngineConfig.capture`).

    Args:
        costs: step times, for all kinds of draws; None: they are measured.
    """
    if config.tune and group is None:
        tune(model, step_sizes(config))
    num_blocks = cache_blocks(model, config)
    if group is not None:  # the ranks schedule alike only if their caches are alike
        num_blocks = group.smallest(num_blocks)
    engine = Engine(model, config, eos_ids=eos_ids, pad_id=pad_id, num_blocks=num_blocks, tokenizer=tokenizer)
    if config.policy == "adaptive":
        greedy = costs or measure_costs(engine, SamplingParams())
        others = {} if costs else {work: measure_costs(engine, sampling) for work, sampling in _SAMPLED.items()}
        engine.policy = AdaptiveWindow(greedy, greedy.widths, others=others)
    if config.capture:
        engine.capture()
    return engine


def cache_blocks(model: DecoderModel, config: EngineConfig) -> int:
    """Blocks of the cache: as configured, or enough for `max_rows` of the longest rows, if the GPU has the room.

    Raises:
        InputError: not even one row of `max_tokens` fits, or fewer blocks than configured.
    """
    wanted = config.cache_blocks or 1 + config.max_rows * config.row_blocks
    if model.device.type != "cuda":
        return wanted
    free, total = torch.cuda.mem_get_info(model.device)
    budget = free - (1 - config.memory_fraction + _GRAPH_SHARE) * total - step_bytes(model, config)
    fitting = int(budget // block_bytes(model, config))
    if config.cache_blocks is not None and fitting < wanted:
        raise InputError(
            f"cache_blocks: {wanted} blocks take {wanted * block_bytes(model, config) / 2**30:.1f} GiB, the GPU has "
            f"{max(budget, 0) / 2**30:.1f} GiB left for them"
        )
    if fitting < 1 + config.row_blocks:
        raise InputError(
            f"too little GPU memory for one row of max_tokens={config.max_tokens}: {budget / 2**30:.1f} GiB hold "
            f"{max(fitting, 0)} cache blocks, {1 + config.row_blocks} are needed"
        )
    return min(wanted, fitting)


def step_bytes(model: DecoderModel, config: EngineConfig) -> int:
    """Bytes that the largest step takes beside weights, cache and activations of layers: its logits, once in the graphs
    and once for the sampler, and what the sampler makes of them.
    """
    logits = bucket(config.max_rows) * config.width * model.shape.vocab_size
    return 2 * logits * model.dtype.itemsize + DRAW_BYTES


def block_bytes(model: DecoderModel, config: EngineConfig) -> int:
    """Bytes of one cache block over all layers, keys and values."""
    heads = model.heads
    token_bytes = 2 * heads.num_kv * heads.size * torch.empty((), dtype=model.dtype).element_size()
    return model.shape.num_layers * config.block_tokens * token_bytes


def measure_costs(engine: Engine, sampling: SamplingParams) -> CostTable:
    """Step times of this engine for powers of two of rows and of window tokens, if requests ask for such a draw."""
    config = engine.config
    context = min(_TYPICAL_CONTEXT, config.max_tokens - 1)
    batches, widths = _powers_of_two(config.max_rows), _powers_of_two(config.window)
    return time_steps(engine.runner, batches, widths, context, sampling)


def step_sizes(config: EngineConfig) -> list[int]:
    """Tokens of the steps that may come, for powers of two of rows."""
    widths = _powers_of_two(config.window) if config.policy == "adaptive" else [config.width]
    return sorted({width * bucket(rows) for width in widths for rows in _powers_of_two(config.max_rows)})


def _powers_of_two(most: int) -> list[int]:
    """1, 2, 4 ... and `most`."""
    return sorted({min(1 << i, most) for i in range(most.bit_length() + 1)})
