"""Our settings and requests in vLLM's words."""

from collections.abc import Iterable, Sequence
from dataclasses import fields
from importlib.util import find_spec
from typing import Any

from cllm.decoding.records import DecodeRequest
from cllm.errors import InputError
from cllm.vllm.config import PeerConfig
from cllm.vllm.drafts import check_draft
from cllm.vllm.jacobi_hooks import NEEDS_ASYNC

JACOBI_WORKER = "cllm.vllm.jacobi_worker.JacobiWorker"
JACOBI_SCHEDULER = "cllm.vllm.jacobi_scheduler.JacobiScheduler"


def check_config(config: PeerConfig) -> None:
    """Raise InputError for settings that contradict each other or the checkpoints. Needs no vLLM."""
    check_draft(config)
    if config.method == "jacobi" and config.async_scheduling is False:
        raise InputError(NEEDS_ASYNC)
    if config.method == "suffix" and find_spec("arctic_inference") is None:
        raise InputError("method suffix needs arctic-inference: pip install arctic-inference==0.1.1")
    if config.method == "ngram" and config.ngram_min > config.ngram_max:
        raise InputError(f"ngram_min={config.ngram_min} exceeds ngram_max={config.ngram_max}")


def check_argument_names(names: Iterable[str]) -> None:
    """Raise InputError for what is no engine argument of the installed vLLM."""
    from vllm.engine.arg_utils import EngineArgs

    unknown = sorted(set(names) - {field.name for field in fields(EngineArgs)})
    if unknown:
        raise InputError(f"engine_args: vLLM has no engine argument {unknown[0]!r}")


def engine_arguments(config: PeerConfig) -> dict[str, Any]:
    """Keyword arguments of `vllm.LLM`, all of them documented engine arguments."""
    arguments: dict[str, Any] = {
        "model": config.model,
        "dtype": config.dtype,
        "max_num_seqs": config.max_rows,
        "enable_prefix_caching": config.reuse_prefixes,
        "gpu_memory_utilization": config.memory_fraction,
        "tensor_parallel_size": config.gpus,
        "enforce_eager": not config.cuda_graphs,
        "skip_tokenizer_init": not config.tokenizer,
        "seed": config.seed,
        "disable_log_stats": False,  # the acceptance metrics are among them
    }
    optional = {
        "max_model_len": config.max_tokens,
        "kv_cache_memory_bytes": config.cache_bytes,
        "async_scheduling": config.async_scheduling,
        "speculative_config": speculative_config(config),
    }
    arguments |= {name: value for name, value in optional.items() if value is not None}
    if config.method == "jacobi":
        arguments |= {
            "worker_cls": JACOBI_WORKER,
            "scheduler_cls": JACOBI_SCHEDULER,
            "diffusion_config": {"canvas_length": config.guesses},
            "additional_config": {"jacobi": config.jacobi.model_dump()},
        }
    return arguments


def speculative_config(config: PeerConfig) -> dict[str, Any] | None:
    """vLLM's `speculative_config`; None for AR and Jacobi decoding, which it does not know."""
    if config.method in ("ar", "jacobi"):
        return None
    settings: dict[str, Any] = {"method": config.method, "num_speculative_tokens": config.guesses}
    if config.draft is not None:
        settings["model"] = config.draft
    if config.method == "ngram":
        settings |= {"prompt_lookup_max": config.ngram_max, "prompt_lookup_min": config.ngram_min}
    return settings


def sampling_arguments(request: DecodeRequest, eos_ids: Sequence[int]) -> dict[str, Any]:
    """Keyword arguments of vLLM's sampling parameters that mean the same as ours.

    The seed is given to greedy requests as well: guesses of Jacobi decoding depend on it.

    Raises:
        InputError: penalties that would have to count tokens of the prompt; vLLM's cannot.
    """
    sampling = request.sampling
    if request.num_given and (sampling.presence_penalty or sampling.frequency_penalty):
        raise InputError("num_given: vLLM's presence_penalty and frequency_penalty count no tokens of the prompt")
    shared = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    return {
        **{name: getattr(sampling, name) for name in (*shared, "logprobs", "ignore_eos")},
        "min_tokens": max(0, sampling.min_tokens - request.num_given),
        "seed": sampling.signed_seed,
        "max_tokens": request.max_new_tokens,
        "stop": list(sampling.stop),
        "stop_token_ids": sorted(sampling.end_ids(eos_ids)),
        "detokenize": bool(sampling.stop),
    }
