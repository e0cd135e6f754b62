"""What Jacobi decoding needs of vLLM, checked when an engine starts: a later version may have moved it."""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from importlib import import_module
from typing import Any, NamedTuple

from cllm.errors import InputError
from cllm.vllm.config import JacobiOptions


class Hook(NamedTuple):
    """`name` of the class `owner` in `module`: an attribute, or a field of a dataclass."""

    module: str
    owner: str
    name: str
    purpose: str


_BATCH = "vllm.v1.worker.gpu.input_batch"
_SAMPLE = "vllm.v1.worker.gpu.sample"
HOOKS = (
    Hook("vllm.config.diffusion", "DiffusionConfig", "canvas_length", "reserves the window's guesses"),
    Hook("vllm.config", "VllmConfig", "num_speculative_tokens", "follows canvas_length"),
    Hook("vllm.config", "VllmConfig", "use_v2_model_runner", "tells the model runner"),
    Hook("vllm.v1.worker.gpu.model_runner", "GPUModelRunner", "sample", "calls the sampler with every logit"),
    Hook(f"{_SAMPLE}.sampler", "Sampler", "__call__", "draws from every logit"),
    Hook(f"{_SAMPLE}.output", "SamplerOutput", "num_sampled", "takes the number of tokens a row commits"),
    Hook(f"{_SAMPLE}.output", "SamplerOutput", "num_rejected", "rolls the cache back"),
    Hook(_BATCH, "InputBatch", "cu_num_logits", "says which logits are a row's"),
    Hook(_BATCH, "InputBatch", "logits_indices", "says which inputs the logits belong to"),
    Hook(_BATCH, "InputBatch", "idx_mapping", "says which slot a row is"),
    Hook(_BATCH, "InputBatch", "seq_lens_cpu_upper_bound", "bounds the length of the rows"),
    Hook("vllm.v1.worker.gpu.cudagraph_utils", "ModelCudaGraphManager", "_init_candidates", "plans the CUDA graphs"),
    Hook("vllm.v1.core.sched.async_scheduler", "AsyncScheduler", "_update_after_schedule", "reserves guesses"),
    Hook("vllm.v1.core.sched.output", "SchedulerOutput", "num_spec_tokens_to_schedule", "narrows the window"),
)


def check_hooks(version: str, hooks: Sequence[Hook] = HOOKS) -> None:
    """Raise InputError if this vLLM lacks one of the hooks; the error names it."""
    for hook in hooks:
        if not _exists(hook):
            raise InputError(
                f"vLLM {version} has no {hook.module}.{hook.owner}.{hook.name}, which {hook.purpose}: Jacobi decoding "
                "inside vLLM works with 0.26 to 0.29"
            )


def check_runner(runner: Any) -> None:
    """Raise InputError if a built model runner lacks what the sampler reads and writes, or cannot decode this way."""
    states = getattr(getattr(runner, "sampler", None), "req_states", None)
    for name in ("draft_tokens", "all_token_ids", "prompt_len", "prefill_len"):
        if not hasattr(states, name):
            raise InputError(f"vLLM's model runner has no sampler.req_states.{name}, where Jacobi guesses live")
    if getattr(runner, "batch_sharder", None) is not None:
        raise InputError("batch-sharded sampling: Jacobi decoding needs every rank to sample all rows; turn it off")


def check_config(config: Any) -> JacobiOptions:
    """The options in a built vLLM configuration.

    Raises:
        InputError: it would decode without guesses, or wrongly.
    """
    if not config.use_v2_model_runner:
        raise InputError("VLLM_USE_V2_MODEL_RUNNER: Jacobi decoding needs vLLM's model runner V2; this engine uses V1")
    if config.speculative_config is not None:
        raise InputError("speculative_config: Jacobi decoding takes its place; leave it out")
    if config.num_speculative_tokens < 1:
        raise InputError('diffusion_config: Jacobi decoding needs {"canvas_length": n - 1} for a window of n')
    if config.parallel_config.pipeline_parallel_size > 1:
        raise InputError("pipeline_parallel_size: Jacobi decoding runs with tensor parallelism only")
    if "JacobiScheduler" not in str(config.scheduler_config.scheduler_cls):
        raise InputError(
            "scheduler_cls: Jacobi decoding needs cllm.vllm.jacobi_scheduler.JacobiScheduler; with "
            f"{config.scheduler_config.scheduler_cls or 'the default'} it could fall back to AR decoding"
        )
    if not config.scheduler_config.async_scheduling and config.device_config.device_type != "cpu":
        raise InputError("async_scheduling: Jacobi decoding needs it on; every step would wait for the one before")
    return jacobi_options(config)


def jacobi_options(config: Any) -> JacobiOptions:
    """What `additional_config` holds under "jacobi"; the defaults if nothing.

    Raises:
        InputError: an unknown key or a bad value.
    """
    extra = config.additional_config if isinstance(config.additional_config, dict) else {}
    return JacobiOptions.from_data(extra.get("jacobi", {}), where="additional_config.jacobi")


def _exists(hook: Hook) -> bool:
    try:
        owner = getattr(import_module(hook.module), hook.owner)
    except (ImportError, AttributeError):
        return False
    return hasattr(owner, hook.name) or (is_dataclass(owner) and hook.name in {f.name for f in fields(owner)})
