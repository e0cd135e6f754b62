"""vLLM as a `Backend`: AR, its speculative methods, and Jacobi decoding inside it."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cllm.decoding.backend import RequestFailedError, generate
from cllm.decoding.records import Commit, DecodeRequest, DecodeResult, TokenLogprob
from cllm.decoding.stats import Acceptance, BackendStats, StepStats, device_memory_bytes
from cllm.engine.engine import check_vocabulary
from cllm.errors import InputError
from cllm.vllm.arguments import check_argument_names, check_config, engine_arguments, sampling_arguments
from cllm.vllm.config import PeerConfig
from cllm.vllm.jacobi_hooks import SCHEDULER_HOOKS, WORKER_HOOKS, check_hooks
from cllm.vllm.jacobi_hooks import check_config as check_built_config
from cllm.vllm.metrics import acceptance_of_counts, acceptance_of_metrics, load
from cllm.vllm.versions import require_vllm

_ID_PREFIX = "stream-"  # other than the ids that `LLM.generate` gives


class VllmBackend:
    """A `cllm.decoding.backend.Backend`: one vLLM engine, loaded at construction.

    With VLLM_ENABLE_V1_MULTIPROCESSING=0 vLLM's scheduler lives in this process, so nothing outlives it, and an abort
    takes effect before the next step. Otherwise it is a process of its own, which stays behind if this one is killed.

    Args:
        more: further engine arguments of vLLM; they take precedence over those of `config`.

    Raises:
        InputError: vLLM is not installed, it has no such argument, or the configuration contradicts itself or the
            checkpoints.
    """

    def __init__(self, config: PeerConfig, **more: Any) -> None:
        check_config(config)
        self.version = require_vllm()
        check_argument_names(more)
        from vllm import LLM

        self.config = config
        arguments = engine_arguments(config) | more
        if config.method == "jacobi":
            _check_jacobi(arguments, self.version)
        self.llm: LLM | None = LLM(**arguments)
        self._engine = self.llm.llm_engine
        self._next_key = 0
        self._asked: dict[int, int] = {}  # how many log-probabilities, by the keys that ask for any
        self._failed: list[tuple[int, str]] = []  # keys and reasons that no step has told yet
        self._latest: list[Commit] = []
        self._read_at = time.perf_counter()
        self._milliseconds = 0.0

    @property
    def num_unfinished(self) -> int:
        return self._engine.get_num_unfinished_requests() + len(self._failed)

    @property
    def last_step(self) -> StepStats | None:
        """Made when it is asked for: vLLM's gauges take their time, and not everybody wants them."""
        if not self._latest:
            return None
        waiting, cache_used = load()
        return StepStats(
            rows=len(self._latest),
            window=self._window(),
            accepted=sum(len(commit.token_ids) for commit in self._latest),
            milliseconds=self._milliseconds,
            unfinished=self.num_unfinished,
            waiting=waiting,
            cache_used=cache_used,
        )

    def add(self, request: DecodeRequest) -> int:
        """Queue a request; its key.

        Raises:
            InputError: it is longer than the context, a token is not in the vocabulary, it has stop texts and no
                tokenizer is loaded, or vLLM refuses it.
        """
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        self._check(request)
        arguments = sampling_arguments(request, self.config.eos_ids)
        prompt = TokensPrompt(prompt_token_ids=list(request.prompt_ids))
        key, self._next_key = self._next_key, self._next_key + 1
        try:
            params = SamplingParams(**arguments, output_kind=RequestOutputKind.DELTA)
            self._engine.add_request(_request_id(key), prompt, params)
        except ValueError as error:
            raise InputError(" ".join(str(error).split())) from error
        if request.sampling.logprobs is not None:
            self._asked[key] = request.sampling.logprobs
        return key

    def abort(self, key: int) -> None:
        self._engine.abort_request([_request_id(key)])
        self._asked.pop(key, None)

    def step(self) -> list[Commit]:
        if self._failed:  # of the step before: it is told first
            self._latest = []
        else:
            self._read(self._engine.step())
        if self._failed:
            key, reason = self._failed.pop(0)
            raise RequestFailedError(key, f"vLLM says {reason}", self._latest)
        return self._latest

    def generate(self, requests: Sequence[DecodeRequest]) -> list[DecodeResult]:
        return generate(self, requests)

    def stats(self) -> BackendStats:
        config = self._engine.vllm_config
        return BackendStats(
            method=self.config.method,
            package="vllm",
            version=self.version,
            runner="V2" if config.use_v2_model_runner else "V1",
            scheduling="async" if config.scheduler_config.async_scheduling else "sync",
            guesses=config.num_speculative_tokens,
            memory_bytes=device_memory_bytes(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
            acceptance=self._acceptance(),
        )

    def check(self) -> None:
        """Raise RuntimeError if a process of vLLM has died."""
        workers = getattr(self._engine, "model_executor", None)  # of a scheduler in this process
        scheduler = getattr(self._engine.engine_core, "resources", None)  # of one in another
        if getattr(workers, "is_failed", False) or getattr(scheduler, "engine_dead", False):
            raise RuntimeError("a process of vLLM has died; the log says why")

    def close(self) -> None:
        """Free the device: vLLM's engine ends, in whatever process it runs."""
        if self.llm is None:
            return
        self._engine.engine_core.shutdown()
        self.llm = self._engine = None

    def _read(self, outputs: Sequence[Any]) -> None:
        now = time.perf_counter()
        self._latest = []
        for output in outputs:
            key, text = int(output.request_id.removeprefix(_ID_PREFIX)), output.outputs[0]
            if text.finish_reason in (None, "stop", "length"):
                self._latest.append(self._commit(key, text))
            else:  # an answer that vLLM gave up is not one that was merely cut short
                self._failed.append((key, text.finish_reason))
                self._asked.pop(key, None)
        if self._latest:
            self._milliseconds, self._read_at = 1000 * (now - self._read_at), now

    def _check(self, request: DecodeRequest) -> None:
        model = self._engine.model_config
        check_vocabulary(request, model.get_vocab_size())
        length = len(request.prompt_ids) + request.max_new_tokens
        if length > model.max_model_len:
            raise InputError(
                f"{len(request.prompt_ids)} prompt tokens and max_new_tokens={request.max_new_tokens} make {length}, "
                f"the engine's max_tokens is {model.max_model_len}"
            )
        if request.sampling.stop and not self.config.tokenizer:
            raise InputError("stop: texts end a response only where a tokenizer is loaded (tokenizer=true)")

    def _commit(self, key: int, output: Any) -> Commit:
        tokens, asked = tuple(output.token_ids), self._asked.get(key)
        if output.finish_reason is not None:
            self._asked.pop(key, None)
        if asked is None:
            return Commit(key, tokens, output.finish_reason)
        found = zip(tokens, output.logprobs, strict=True)
        return Commit(
            key, tokens, output.finish_reason, tuple(_logprob(token, likely, asked) for token, likely in found)
        )

    def _window(self) -> int:
        """Of the latest step, where the scheduler is ours and in this process; else the widest."""
        scheduler = getattr(getattr(self._engine.engine_core, "engine_core", None), "scheduler", None)
        if self.config.method == "jacobi" and scheduler is not None:
            return scheduler.latest_window
        return 1 + self._engine.vllm_config.num_speculative_tokens

    def _acceptance(self) -> Acceptance | None:
        assert self.llm is not None, "the backend is closed"
        if self.config.method == "ar":
            return None
        if self.config.method == "jacobi":
            return acceptance_of_counts(self.llm.collective_rpc("jacobi_counts")[0])
        return acceptance_of_metrics(self.llm.get_metrics())


def _check_jacobi(arguments: dict[str, Any], version: str) -> None:
    """The worker's and the scheduler's own checks, made here already: their processes can only die of them."""
    from vllm.engine.arg_utils import EngineArgs

    check_hooks(version, (*WORKER_HOOKS, *SCHEDULER_HOOKS))
    check_built_config(EngineArgs(**arguments).create_engine_config())


def _request_id(key: int) -> str:
    return f"{_ID_PREFIX}{key}"


def _logprob(token: int, likely: Mapping[int, Any], asked: int) -> TokenLogprob:
    """`likely` holds the likeliest tokens and, whether or not it is one of them, the token itself."""
    ranked = sorted(likely.items(), key=lambda item: item[1].rank)[:asked]
    return TokenLogprob(likely[token].logprob, tuple((other, found.logprob) for other, found in ranked))
