"""vLLM behind the `Backend` interface: AR, its speculative methods, and Jacobi decoding inside it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from cllm.decoding.records import Commit, DecodeRequest, FinishReason, TokenLogprob
from cllm.errors import InputError
from cllm.vllm.backend import Acceptance, BackendResult, BackendStats, device_memory_bytes
from cllm.vllm.config import PeerConfig
from cllm.vllm.drafts import check_draft
from cllm.vllm.jacobi_hooks import check_config as check_built_config
from cllm.vllm.jacobi_hooks import check_hooks
from cllm.vllm.versions import require_vllm

if TYPE_CHECKING:
    import vllm

JACOBI_WORKER = "cllm.vllm.jacobi_worker.JacobiWorker"
JACOBI_SCHEDULER = "cllm.vllm.jacobi_scheduler.JacobiScheduler"
_ID_PREFIX = "stream-"


class VllmBackend:
    """One vLLM engine, loaded at construction.

    Args:
        more: further engine arguments of vLLM; they take precedence over those of `config`.

    Raises:
        InputError: vLLM is not installed, or the configuration contradicts itself or the checkpoints.
    """

    def __init__(self, config: PeerConfig, **more: Any) -> None:
        check_config(config)
        self.version = require_vllm()
        import vllm

        self.config = config
        arguments = engine_arguments(config) | more
        if config.method == "jacobi":
            _check_jacobi(arguments, self.version)
        self.llm: vllm.LLM | None = vllm.LLM(**arguments)
        self._next_key = 0
        self._asked: dict[int, int] = {}  # how many log-probabilities, by the keys that ask for any

    def generate(self, requests: Sequence[DecodeRequest]) -> list[BackendResult]:
        from vllm.inputs import TokensPrompt

        llm = self._open()
        params = [self._params(request) for request in requests]
        prompts = [TokensPrompt(prompt_token_ids=list(request.prompt_ids)) for request in requests]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return [self._result(output.outputs[0]) for output in outputs]

    def add(self, request: DecodeRequest) -> int:
        """Queue a request; the key that names it in `step` and `abort`."""
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        params = self._params(request, output_kind=RequestOutputKind.DELTA)
        key, self._next_key = self._next_key, self._next_key + 1
        prompt = TokensPrompt(prompt_token_ids=list(request.prompt_ids))
        self._open().llm_engine.add_request(_request_id(key), prompt, params)
        if request.sampling.logprobs is not None:
            self._asked[key] = request.sampling.logprobs
        return key

    def abort(self, *keys: int) -> None:
        """Forget requests; nothing of those that are finished."""
        self._open().llm_engine.abort_request([_request_id(key) for key in keys])
        for key in keys:
            self._asked.pop(key, None)

    def step(self) -> list[Commit]:
        """Decode on; what was committed, `row` being the request's key."""
        outputs = self._open().llm_engine.step()
        return [self._commit(_key_of(output.request_id), output.outputs[0]) for output in outputs]

    def stream(self, requests: Sequence[DecodeRequest]) -> Iterator[list[Commit]]:
        row_of: dict[int, int] = {}
        finished: set[int] = set()
        try:
            for row, request in enumerate(requests):
                row_of[self.add(request)] = row
            while row_of.keys() - finished:
                commits = [commit for commit in self.step() if commit.row in row_of]
                finished |= {commit.row for commit in commits if commit.finish_reason is not None}
                if commits:
                    yield [replace(commit, row=row_of[commit.row]) for commit in commits]
        finally:
            self.abort(*(row_of.keys() - finished))

    def stats(self) -> BackendStats:
        llm = self._open()
        config = llm.llm_engine.vllm_config
        return BackendStats(
            method=self.config.method,
            package="vllm",
            version=self.version,
            runner="V2" if config.use_v2_model_runner else "V1",
            scheduling="async" if config.scheduler_config.async_scheduling else "sync",
            guesses=config.num_speculative_tokens,
            memory_bytes=device_memory_bytes(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
            acceptance=self._acceptance(llm),
        )

    def close(self) -> None:
        """Free the device: vLLM's engine ends, in whatever process it runs."""
        if self.llm is None:
            return
        shutdown = getattr(self.llm.llm_engine.engine_core, "shutdown", None)
        if shutdown is not None:
            shutdown()
        self.llm = None

    def _open(self) -> "vllm.LLM":
        assert self.llm is not None, "the backend is closed"
        return self.llm

    def _params(self, request: DecodeRequest, **more: Any) -> "vllm.SamplingParams":
        from vllm import SamplingParams as VllmParams

        sampling = request.sampling
        if sampling.stop and not self.config.tokenizer:
            raise InputError("stop: texts end a response only where a tokenizer is loaded (tokenizer=true)")
        return VllmParams(**sampling_arguments(request, self.config.eos_ids), **more)

    def _commit(self, key: int, output: Any) -> Commit:
        tokens, asked = tuple(output.token_ids), self._asked.get(key)
        reason = _reason(output) if output.finish_reason else None
        if reason is not None:
            self._asked.pop(key, None)
        if asked is None:
            return Commit(key, tokens, reason)
        found = zip(tokens, output.logprobs, strict=True)
        return Commit(key, tokens, reason, tuple(_logprob(token, likely, asked) for token, likely in found))

    def _result(self, output: Any) -> BackendResult:
        tokens = tuple(output.token_ids)
        return BackendResult(tokens, _reason(output), len(tokens) if self.config.method == "ar" else None)

    def _acceptance(self, llm: "vllm.LLM") -> Acceptance | None:
        if self.config.method == "ar":
            return None
        if self.config.method == "jacobi":
            return acceptance_of_counts(llm.collective_rpc("jacobi_counts")[0])
        found = {metric.name: metric for metric in llm.get_metrics()}
        prefix = "vllm:spec_decode_num_"
        steps, proposed, accepted = (found[prefix + name].value for name in _COUNTERS)
        return Acceptance(steps, proposed, accepted, tuple(found[prefix + "accepted_tokens_per_pos"].values))


_COUNTERS = ("drafts", "draft_tokens", "accepted_tokens")


def check_config(config: PeerConfig) -> None:
    """Raise InputError for settings that contradict each other or the checkpoints."""
    check_draft(config)
    if config.method == "jacobi" and config.async_scheduling is False:
        raise InputError("async_scheduling: Jacobi decoding needs it on; every step would wait for the one before")
    if config.method == "suffix" and find_spec("arctic_inference") is None:
        raise InputError("method suffix needs arctic-inference: pip install arctic-inference==0.1.1")
    if config.method == "ngram" and config.ngram_min > config.ngram_max:
        raise InputError(f"ngram_min={config.ngram_min} exceeds ngram_max={config.ngram_max}")


def _check_jacobi(arguments: dict[str, Any], version: str) -> None:
    """The worker's own checks, made here already: its process can only fail with a traceback."""
    from vllm.engine.arg_utils import EngineArgs

    check_hooks(version)
    check_built_config(EngineArgs(**arguments).create_engine_config())


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
    """
    sampling = request.sampling
    shared = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    return {
        **{name: getattr(sampling, name) for name in (*shared, "logprobs", "min_tokens", "ignore_eos")},
        "seed": sampling.signed_seed,
        "max_tokens": request.max_new_tokens,
        "stop": list(sampling.stop),
        "stop_token_ids": sorted(sampling.end_ids(eos_ids)),
        "detokenize": bool(sampling.stop),
    }


def acceptance_of_counts(counts: Sequence[Sequence[int]]) -> Acceptance:
    """From how often a row with w inputs committed a tokens: entry [w][a]. Rows without guesses are left out."""
    widths = range(2, len(counts))
    steps = sum(sum(counts[w]) for w in widths)
    proposed = sum((w - 1) * sum(counts[w]) for w in widths)
    accepted_at = tuple(sum(sum(counts[w][place + 1 :]) for w in widths) for place in range(1, len(counts) - 1))
    return Acceptance(steps, proposed, sum(accepted_at), accepted_at)


def _request_id(key: int) -> str:
    """Other than the ids that `LLM.generate` gives."""
    return f"{_ID_PREFIX}{key}"


def _key_of(request_id: str) -> int:
    return int(request_id.removeprefix(_ID_PREFIX))


def _logprob(token: int, likely: Mapping[int, Any], asked: int) -> TokenLogprob:
    """`likely` holds the likeliest tokens and, whether or not it is one of them, the token itself."""
    ranked = sorted(likely.items(), key=lambda item: item[1].rank)[:asked]
    return TokenLogprob(likely[token].logprob, tuple((other, found.logprob) for other, found in ranked))


def _reason(output: Any) -> FinishReason:
    return "stop" if output.finish_reason == "stop" else "length"
