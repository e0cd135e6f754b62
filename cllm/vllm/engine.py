"""vLLM as an engine that a thread steps, with the words and refusals of our own."""

import time
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from cllm.decoding.records import Commit, DecodeRequest
from cllm.engine.engine import StepStats, check_vocabulary
from cllm.errors import InputError
from cllm.vllm.config import PeerConfig
from cllm.vllm.llm import VllmBackend
from cllm.vllm.versions import require_vllm

_CACHE_USED, _WAITING = "vllm:kv_cache_usage_perc", "vllm:num_requests_waiting"


class VllmEngine:
    """A `cllm.engine.async_engine.SteppedEngine`.

    With VLLM_ENABLE_V1_MULTIPROCESSING=0 vLLM's scheduler lives in this process, so nothing outlives it, and an abort
    takes effect before the next step. Otherwise it is a process of its own, which stays behind if this one is killed.

    Args:
        more: further engine arguments of vLLM; they take precedence over those of `config`.

    Raises:
        InputError: vLLM is not installed, it has no such argument, or the configuration contradicts itself or the
            checkpoints.
    """

    def __init__(self, config: PeerConfig, **more: Any) -> None:
        _check_arguments(more)
        self._backend = VllmBackend(config, **more)
        assert self._backend.llm is not None
        self._engine = self._backend.llm.llm_engine
        self._window = 1 + self._engine.vllm_config.num_speculative_tokens
        self._read_at = time.perf_counter()
        self.last_step: StepStats | None = None

    @property
    def num_unfinished(self) -> int:
        return self._engine.get_num_unfinished_requests()

    def add(self, request: DecodeRequest) -> int:
        """Queue a request; its key.

        Raises:
            InputError: it is longer than the context, a token is not in the vocabulary, or vLLM refuses it.
        """
        model = self._engine.model_config
        check_vocabulary(request, model.get_vocab_size())
        length = len(request.prompt_ids) + request.max_new_tokens
        if length > model.max_model_len:
            raise InputError(
                f"{len(request.prompt_ids)} prompt tokens and max_new_tokens={request.max_new_tokens} make {length}, "
                f"the engine's max_tokens is {model.max_model_len}"
            )
        try:
            return self._backend.add(request)
        except ValueError as error:
            raise InputError(" ".join(str(error).split())) from error

    def abort(self, key: int) -> None:
        """Forget a request; nothing if it is finished."""
        self._backend.abort(key)

    def step(self) -> list[Commit]:
        """Decode on; what was committed, `row` being a request's key."""
        commits = self._backend.step()
        self.last_step = self._stats(commits) if commits else None
        return commits

    def check(self) -> None:
        """Raise RuntimeError if a process of vLLM has died. Any thread may ask."""
        workers = getattr(self._engine, "model_executor", None)  # of a scheduler in this process
        scheduler = getattr(self._engine.engine_core, "resources", None)  # of one in another
        if getattr(workers, "is_failed", False) or getattr(scheduler, "engine_dead", False):
            raise RuntimeError("a process of vLLM has died; the log says why")

    def close(self) -> None:
        """End vLLM's processes."""
        self._backend.close()

    def _stats(self, commits: list[Commit]) -> StepStats:
        now = time.perf_counter()
        milliseconds, self._read_at = 1000 * (now - self._read_at), now
        gauges = _gauges(_CACHE_USED, _WAITING)
        waiting = gauges.get(_WAITING)
        return StepStats(
            rows=len(commits),
            window=self._window,
            accepted=sum(len(commit.token_ids) for commit in commits),
            milliseconds=milliseconds,
            unfinished=self.num_unfinished,
            waiting=None if waiting is None else int(waiting),
            cache_used=gauges.get(_CACHE_USED),
        )


def _check_arguments(more: Iterable[str]) -> None:
    require_vllm()
    from vllm.engine.arg_utils import EngineArgs

    unknown = sorted(set(more) - {field.name for field in fields(EngineArgs)})
    if unknown:
        raise InputError(f"engine_args: vLLM has no engine argument {unknown[0]!r}")


def _gauges(*names: str) -> dict[str, float]:
    """Of vLLM's own metrics, which live in the registry of the process; those that it does not keep are left out."""
    from prometheus_client import REGISTRY

    found = REGISTRY.restricted_registry(names).collect()
    return {sample.name: sample.value for metric in found for sample in metric.samples}
