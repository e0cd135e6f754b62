"""What a measured cell found, and the record that is kept of it."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from cllm.bench.matrix import Cell
from cllm.config import Config
from cllm.decoding.stats import BackendStats

SCHEMA_VERSION = 3  # of records and of documents that gather them; `cllm.bench.convert` reads the earlier ones


class EngineFacts(Config):
    """What served a cell, and how its guesses fared there (`cllm.decoding.stats`), untimed answers included.

    Attributes:
        package, version: whose engine.
        runner: vLLM's model runner, V1 or V2; None for other engines.
        scheduling: async where the next step is planned while one runs, else sync.
        guesses: most guesses that a step verifies for a row; 0 is AR decoding.
        steps: row-steps that verified guesses. This and what follows is None where the engine does not count.
        proposed, accepted: guesses.
        accepted_at: guesses accepted at each place of the window, first place first.
    """

    package: str
    version: str
    runner: str | None = None
    scheduling: str
    guesses: int
    steps: int | None = None
    proposed: int | None = None
    accepted: int | None = None
    accepted_at: tuple[int, ...] | None = None

    @classmethod
    def of(cls, stats: BackendStats) -> Self:
        found = stats.acceptance
        counts = {} if found is None else {name: getattr(found, name) for name in ("steps", "proposed", "accepted")}
        return cls(
            package=stats.package,
            version=stats.version,
            runner=stats.runner,
            scheduling=stats.scheduling,
            guesses=stats.guesses,
            **counts,
            accepted_at=None if found is None else found.accepted_at,
        )

    @property
    def acceptance(self) -> float | None:
        """Share of the guesses that held; None where there were none, or the engine does not count."""
        return None if self.accepted is None or not self.proposed else self.accepted / self.proposed


class CellResult(Config):
    """What a finished cell found.

    What is given per prompt stands in the order of `prompt_ids`. Both turns of a conversation are prompts: first come
    all first turns, then all second ones (`cllm.tasks.prompts.second_turn_id`).

    Attributes:
        tokens_per_s: one figure a repeat, new tokens of all requests over the time from the first to the last; () where
            nothing was timed, and then no other time is there either.
        energy_j: joules per new token of each timed repeat, of the whole GPU; () where the device has no counter.
        tpf: tokens a forward and request.
        latency_ms: percentiles (nearest rank) of the time from a request's start to its last token.
        step_ms: median over the repeats of the median milliseconds between steps that all requests in flight took part
            in; None if there were none.
        floor_ms: the time in which one device copies as many bytes as the whole weights have; 0 where nothing was
            timed.
        memory_gib: what this load needs, computed alike for all methods: weights, those of draft or heads, and the
            keys and values of so many of the longest requests (`cllm.bench.memory`); None where a size is not known.
        device_memory_gib: memory in use on the GPU, by an engine with room for the most requests that it served; of
            vLLM, which takes all it may for its cache, it says what it was allowed.
        scores: in [0, 1], one per prompt; () where only a judge could tell (`metric` says so), or nothing is scored.
        response_digests: hashes of the responses' tokens.
        response_tokens: new tokens, end tokens included; () in records of the first schema.
        response_forwards: forward passes that committed tokens of the response; () as before.
        categories: the task's; () where it has none.
        responses: texts, kept only where the metric is a judge's.
        parameters: of the model; None where its configuration does not tell.
        trained_parameters: what was trained on top of the teacher: all weights of a CLLM (or its adapters), the draft
            model, the heads, a model trained with them, or their sum; 0 for the teacher; None for what others trained
            and keep elsewhere.
        fast_forwarded, stationary: of the paper's section 4.2; only for its Jacobi decoding.
        reference_perplexity: on the held-out reference answers; only for AR, and where all prompts have one.
        perplexity: by corpus, per token (`cllm.evaluation.corpora`); only for AR with one request in flight.
        word_perplexity: the same per word, which compares models of different tokenizers.
        engine: None in records of earlier schemas.
    """

    metric: str
    tokens_per_s: tuple[float, ...]
    energy_j: tuple[float, ...] = ()
    tpf: float
    latency_ms: Mapping[str, float]
    step_ms: float | None = None
    floor_ms: float
    memory_gib: float | None = None
    device_memory_gib: float | None = None
    prompt_ids: tuple[str, ...] = Field(min_length=1)
    scores: tuple[float, ...]
    response_digests: tuple[str, ...]
    response_tokens: tuple[int, ...]
    response_forwards: tuple[int, ...]
    mean_response_tokens: float
    categories: tuple[str, ...] = ()
    responses: tuple[str, ...] = ()
    parameters: int | None = None
    trained_parameters: int | None = None
    fast_forwarded: float | None = None
    stationary: float | None = None
    reference_perplexity: float | None = None
    perplexity: Mapping[str, float] = {}
    word_perplexity: Mapping[str, float] = {}
    engine: EngineFacts | None = None

    @model_validator(mode="after")
    def _one_entry_per_prompt(self) -> "CellResult":
        optional = ("scores", "response_tokens", "response_forwards", "categories", "responses")
        for name in ("response_digests", *optional):
            count = len(getattr(self, name))
            if count != len(self.prompt_ids) and (count or name not in optional):
                raise ValueError(f"{name}: {count} entries for {len(self.prompt_ids)} prompts")
        return self


class CellRecord(Config):
    """One cell's file: what was measured, how it went, and where."""

    schema_version: int = SCHEMA_VERSION
    key: str
    status: Literal["done", "failed"]
    cell: Cell
    attempts: int
    seconds: float
    provenance: Mapping[str, Any]
    result: CellResult | None = None
    error: str | None = None
