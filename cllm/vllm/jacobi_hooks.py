"""What Jacobi decoding needs of vLLM, checked when an engine starts: a later version may have moved it.

This module imports nothing of vLLM, so that whoever finds it changed is told what has moved, and not by an ImportError.
"""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from importlib import import_module
from pkgutil import resolve_name
from typing import Any, NamedTuple

from cllm.errors import InputError
from cllm.vllm.config import JacobiOptions
from cllm.vllm.versions import TESTED_TEXT

NEEDS_ASYNC = "async_scheduling: Jacobi decoding needs it on; every step would wait for the one before"


class JacobiPart:
    """Base of the worker and the scheduler of Jacobi decoding: each refuses to start without the other."""


class Hook(NamedTuple):
    """`name` of the class `owner` in `module`: an attribute, or a field of a dataclass."""

    module: str
    owner: str
    name: str
    purpose: str


_BATCH = "vllm.v1.worker.gpu.input_batch"
_SAMPLE = "vllm.v1.worker.gpu.sample"
_RUNNER = "vllm.v1.worker.gpu.model_runner"
WORKER_HOOKS = (
    Hook("vllm.config.diffusion", "DiffusionConfig", "canvas_length", "reserves the window's guesses"),
    Hook("vllm.config", "VllmConfig", "num_speculative_tokens", "follows canvas_length"),
    Hook("vllm.config", "VllmConfig", "use_v2_model_runner", "tells the model runner"),
    Hook("vllm.v1.worker.gpu_worker", "Worker", "compile_or_warm_up_model", "captures CUDA graphs"),
    Hook(_RUNNER, "GPUModelRunner", "sample", "calls the sampler with every logit"),
    Hook(_RUNNER, "GPUModelRunner", "execute_model", "runs the steps that are timed"),
    Hook(_RUNNER, "ExecuteModelState", "hidden_states", "holds what such a step computed"),
    Hook(f"{_SAMPLE}.sampler", "Sampler", "__call__", "draws from every logit"),
    Hook(f"{_SAMPLE}.output", "SamplerOutput", "num_sampled", "takes the number of tokens a row commits"),
    Hook(f"{_SAMPLE}.output", "SamplerOutput", "num_rejected", "rolls the cache back"),
    Hook(_BATCH, "InputBatch", "input_ids", "holds the guesses that are verified"),
    Hook(_BATCH, "InputBatch", "positions", "says where in its request a row is"),
    Hook(_BATCH, "InputBatch", "cu_num_logits", "says which logits are a row's"),
    Hook(_BATCH, "InputBatch", "logits_indices", "says which inputs the logits belong to"),
    Hook(_BATCH, "InputBatch", "idx_mapping", "says which slot a row is"),
    Hook(_BATCH, "InputBatch", "seq_lens_cpu_upper_bound", "bounds the length of the rows"),
    Hook("vllm.v1.worker.gpu.cudagraph_utils", "ModelCudaGraphManager", "_init_candidates", "plans the CUDA graphs"),
)
SCHEDULER_HOOKS = (
    Hook("vllm.v1.core.sched.async_scheduler", "AsyncScheduler", "_update_after_schedule", "reserves guesses"),
    Hook("vllm.v1.core.sched.async_scheduler", "AsyncScheduler", "update_from_output", "tells what held"),
    Hook("vllm.v1.core.sched.output", "SchedulerOutput", "num_spec_tokens_to_schedule", "narrows the window"),
    Hook("vllm.v1.core.sched.output", "SchedulerOutput", "scheduled_spec_decode_tokens", "says what rows guess"),
    Hook("vllm.v1.core.sched.output", "SchedulerOutput", "scheduled_new_reqs", "says what rows are new"),
    Hook("vllm.v1.request", "Request", "use_structured_output", "tells requests with a grammar"),
)
_RUNNER_ATTRIBUTES = {
    "req_states.draft_tokens": "holds the guesses",
    "req_states.all_token_ids": "holds the rows' tokens",
    "req_states.prompt_len": "bounds the prompts",
    "req_states.prefill_len": "tells rows amid their prompts",
    "sampling_states.seeds": "decides the guesses",
    "use_flashinfer": "chooses the noise",
}
_GRAPH_ATTRIBUTES = ("_candidates", "_capture_descs", "decode_query_len", "cudagraph_mode", "lora_capture_cases")


def check_hooks(version: str, hooks: Sequence[Hook]) -> None:
    """Raise InputError if this vLLM lacks one of the hooks; the error names it."""
    for hook in hooks:
        if not _exists(hook):
            raise InputError(_moved(version, f"{hook.module}.{hook.owner}.{hook.name}", hook.purpose))


def check_runner(version: str, runner: Any) -> None:
    """Raise InputError if a built model runner lacks what the sampler reads and writes, or cannot decode this way."""
    for path, purpose in _RUNNER_ATTRIBUTES.items():
        if not _has(getattr(runner, "sampler", None), path):
            raise InputError(_moved(version, f"model runner with sampler.{path}", purpose))
    if getattr(runner, "batch_sharder", None) is not None:
        raise InputError("batch-sharded sampling: Jacobi decoding needs every rank to sample all rows; turn it off")


def check_graphs(version: str, manager: Any) -> None:
    """Raise InputError if a built CUDA-graph manager is not made as the one that takes its place."""
    for name in _GRAPH_ATTRIBUTES:
        if not hasattr(manager, name):
            raise InputError(_moved(version, f"CUDA-graph manager with {name}", "plans the CUDA graphs"))


def check_scheduler(version: str, scheduler: Any) -> None:
    """Raise InputError if a built scheduler lacks what is set in it."""
    if not hasattr(scheduler, "dynamic_sd_lookup"):
        raise InputError(_moved(version, "scheduler with dynamic_sd_lookup", "keeps narrow batches uniform"))


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
    if not issubclass(config.scheduler_config.get_scheduler_cls(), JacobiPart):
        raise InputError(
            "scheduler_cls: Jacobi decoding needs cllm.vllm.jacobi_scheduler.JacobiScheduler; with "
            f"{config.scheduler_config.scheduler_cls or 'the default'} it could fall back to AR decoding"
        )
    if not issubclass(resolve_name(config.parallel_config.worker_cls), JacobiPart):
        raise InputError(
            "worker_cls: Jacobi decoding needs cllm.vllm.jacobi_worker.JacobiWorker; "
            f"{config.parallel_config.worker_cls} would accept guesses that nobody verified"
        )
    if not config.scheduler_config.async_scheduling and config.device_config.device_type != "cpu":
        raise InputError(NEEDS_ASYNC)
    return jacobi_options(config)


def jacobi_options(config: Any) -> JacobiOptions:
    """What `additional_config` holds under "jacobi"; the defaults if nothing.

    Raises:
        InputError: an unknown key or a bad value.
    """
    extra = config.additional_config if isinstance(config.additional_config, dict) else {}
    return JacobiOptions.from_data(extra.get("jacobi", {}), where="additional_config.jacobi")


def _moved(version: str, what: str, purpose: str) -> str:
    return f"vLLM {version} has no {what}, which {purpose}: Jacobi decoding inside vLLM works with {TESTED_TEXT}"


def _exists(hook: Hook) -> bool:
    try:
        owner = getattr(import_module(hook.module), hook.owner)
    except (ImportError, AttributeError):
        return False
    return hasattr(owner, hook.name) or (is_dataclass(owner) and hook.name in {f.name for f in fields(owner)})


def _has(owner: Any, path: str) -> bool:
    for name in path.split("."):
        if not hasattr(owner, name):
            return False
        owner = getattr(owner, name)
    return True
