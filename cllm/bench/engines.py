"""Engines under closed-loop load: ours and vLLM's, one row of figures for each decoder, window and concurrency."""

import gc
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from typing import Any, Literal

import torch

from cllm.bench.closed_loop import Decoder, Load, closed_loop
from cllm.decoding.config import GuessKind
from cllm.decoding.records import DecodeRequest
from cllm.engine.config import EngineConfig
from cllm.engine.load import build_engine
from cllm.engine.model import DecoderModel
from cllm.vllm.backend import device_memory_bytes

DecoderName = Literal["ar", "jacobi", "jacobi-block", "jacobi-adaptive"]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the report.

    Attributes:
        engine: cllm or vllm.
        n: window; 1 is AR; the widest one of an adaptive decoder.
        step_ms: median milliseconds of a step with all rows busy.
        floor_ratio: step_ms over the time in which the device copies as many bytes as the weights have.
        tokens_per_s: new tokens of all requests over the time from the first request to the last token.
        tpf: tokens a forward and row.
        memory_gib: device memory in use by weights, cache and graphs; None where it cannot be told.
    """

    engine: str
    decoder: str
    model: str
    concurrency: int
    n: int
    step_ms: float | None
    floor_ratio: float | None
    tokens_per_s: float
    tpf: float
    memory_gib: float | None

    @classmethod
    def of(cls, load: Load, *, floor_ms: float, **names: Any) -> "Row":
        ratio = None if load.step_ms is None else load.step_ms / floor_ms
        return cls(
            step_ms=load.step_ms,
            floor_ratio=ratio,
            tokens_per_s=load.tokens_per_s,
            tpf=load.tokens_per_forward,
            **names,
        )

    def document(self) -> dict[str, Any]:
        return {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class Case:
    """A decoder with a window at a concurrency."""

    decoder: DecoderName
    n: int
    concurrency: int


def measure_ours(
    model: DecoderModel,
    name: str,
    cases: Sequence[Case],
    requests: Sequence[DecodeRequest],
    *,
    eos_ids: Sequence[int],
    pad_id: int,
    guess: GuessKind,
    floor_ms: float,
) -> Iterator[Row]:
    """A row for each case; `floor_ms` is the time in which the device copies as many bytes as the weights have."""
    longest = max(len(request.prompt_ids) + request.max_new_tokens for request in requests)
    for case in cases:
        config = EngineConfig(
            window=case.n,
            policy="adaptive" if case.decoder == "jacobi-adaptive" else "fixed",
            refill="block" if case.decoder == "jacobi-block" else "sliding",
            guess=guess,
            max_rows=case.concurrency,
            max_tokens=longest,
            reuse_prefixes=False,
        )
        engine = build_engine(model, config, eos_ids=eos_ids, pad_id=pad_id)
        engine.capture()
        load = measure_load(engine, requests, case.concurrency)
        memory = memory_in_use(model.device)
        names = {"engine": "cllm", "decoder": case.decoder, "model": name, "concurrency": case.concurrency, "n": case.n}
        yield Row.of(load, floor_ms=floor_ms, memory_gib=memory, **names)
        del engine
        release(model.device)


def measure_load(decoder: Decoder, requests: Sequence[DecodeRequest], concurrency: int) -> Load:
    """A closed loop over `workload`, after a short one that warms up what is timed."""
    closed_loop(decoder, [replace(request, max_new_tokens=8) for request in requests], concurrency)
    return closed_loop(decoder, workload(requests, concurrency), concurrency)


def workload(requests: Sequence[DecodeRequest], concurrency: int) -> list[DecodeRequest]:
    """The requests, repeated where needed: twice as many as fly at a time, and 16 at least if there are so many."""
    count = max(2 * concurrency, min(16, len(requests)))
    return list(islice(cycle(requests), count))


def memory_in_use(device: torch.device) -> float | None:
    """GiB of the device's memory that are taken, by whomever."""
    taken = device_memory_bytes(device)
    return None if taken is None else taken / 2**30


def release(device: torch.device) -> None:
    """Give an engine's memory back before the next one is built."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
