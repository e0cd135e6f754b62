"""Engines under closed-loop load: ours and vLLM's, one row of figures for each decoder, window and concurrency."""

import gc
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import cycle, islice
from typing import Any, Literal

import torch

from cllm.bench.bandwidth import copy_bandwidth, weight_bytes_of
from cllm.bench.closed_loop import Load, closed_loop
from cllm.bench.engine_subject import EngineSubject
from cllm.decoding.backend import Backend
from cllm.decoding.config import GuessKind
from cllm.decoding.records import DecodeRequest
from cllm.decoding.stats import device_memory_bytes
from cllm.engine.config import EngineConfig
from cllm.engine.engine import Engine
from cllm.engine.graphs import bucket
from cllm.engine.load import build_engine
from cllm.engine.model import DecoderModel
from cllm.engine.parallel import Group
from cllm.engine.shards import ShardedEngine
from cllm.models import default_device, resolve_dtype
from cllm.vllm.config import PeerConfig
from cllm.vllm.llm import VllmBackend

DecoderName = Literal["ar", "jacobi", "jacobi-block", "jacobi-adaptive"]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the report.

    Attributes:
        engine: cllm or vllm.
        n: window; 1 is AR; the widest one of an adaptive decoder.
        gpus: that share the model.
        step_ms: median milliseconds of a step with all rows busy.
        steps_per_s: such steps a second.
        floor_ratio: step_ms over the time in which one device copies as many bytes as the whole weights have.
        tokens_per_s: new tokens of all requests over the time from the first request to the last token.
        tpf: tokens a forward and row.
        memory_gib: device memory in use by weights, cache and graphs; None where it cannot be told.
    """

    engine: str
    decoder: str
    model: str
    concurrency: int
    n: int
    gpus: int
    step_ms: float | None
    steps_per_s: float | None
    floor_ratio: float | None
    tokens_per_s: float
    tpf: float
    memory_gib: float | None

    @classmethod
    def of(cls, load: Load, *, floor_ms: float, gpus: int = 1, **names: Any) -> "Row":
        ratio = None if load.step_ms is None else load.step_ms / floor_ms
        return cls(
            gpus=gpus,
            step_ms=load.step_ms,
            steps_per_s=None if load.step_ms is None else 1000 / load.step_ms,
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

    @property
    def step_tokens(self) -> int:
        """Tokens of a full step: CUDA graphs fill up the batch."""
        return self.n * bucket(self.concurrency)

    def config(self, guess: GuessKind, max_tokens: int) -> EngineConfig:
        return EngineConfig(
            window=self.n,
            policy="adaptive" if self.decoder == "jacobi-adaptive" else "fixed",
            refill="block" if self.decoder == "jacobi-block" else "sliding",
            guess=guess,
            max_rows=self.concurrency,
            max_tokens=max_tokens,
            reuse_prefixes=False,
        )

    def row(self, load: Load, name: str, *, floor_ms: float, memory_gib: float | None, gpus: int = 1) -> Row:
        """The case's row of our engine."""
        names = {"engine": "cllm", "decoder": self.decoder, "model": name, "concurrency": self.concurrency, "n": self.n}
        return Row.of(load, floor_ms=floor_ms, gpus=gpus, memory_gib=memory_gib, **names)


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
    for case in cases:
        config = case.config(guess, longest_of(requests))
        engine = build_engine(model, config, eos_ids=eos_ids, pad_id=pad_id)
        load = measure_load(engine, requests, case.concurrency)
        yield case.row(load, name, floor_ms=floor_ms, memory_gib=memory_in_use(model.device))
        del engine
        release(model.device)


def measure_sharded(
    subject: EngineSubject,
    cases: Sequence[Case],
    requests: Sequence[DecodeRequest],
    world: int,
    *,
    guess: GuessKind,
    floor_ms: float,
) -> Iterator[Row]:
    """The same rows, with the model divided among `world` GPUs (or processes, on a CPU); memory is that of the first.

    Raises:
        InputError: fewer GPUs than that, or a model that cannot be divided so.
    """
    device = default_device()
    for case in cases:
        engine = ShardedEngine(partial(load_part, subject, case.config(guess, longest_of(requests))), world)
        try:
            load = measure_load(engine, requests, case.concurrency)
            yield case.row(load, subject.name, floor_ms=floor_ms, memory_gib=memory_in_use(device), gpus=world)
        finally:
            engine.close()
            del engine
            release(device)


def load_part(subject: EngineSubject, config: EngineConfig, *, group: Group) -> Engine:
    """One rank's engine."""
    device = default_device()
    model, eos_ids, pad_id = subject.open(resolve_dtype("auto", device), device, group)
    return build_engine(model, config, eos_ids=eos_ids, pad_id=pad_id, group=group)


def measure_vllm(
    subject: EngineSubject, concurrencies: Sequence[int], memory_fraction: float
) -> tuple[list[Row], dict[str, Any]]:
    """A row of vLLM's AR decoding for each number of requests in flight, and what vLLM says of itself.

    Raises:
        InputError: vLLM is not installed, or cannot load the model.
    """
    device, config = default_device(), subject.config()
    requests = subject.requests(config.vocab_size)
    floor_ms = 1000 * weight_bytes_of(config) / copy_bandwidth(device)
    with tempfile.TemporaryDirectory() as folder:
        if subject.path is None:
            config.save_pretrained(folder)
        peer = PeerConfig(
            method="ar",
            model=subject.path or folder,
            max_rows=max(concurrencies),
            max_tokens=longest_of(requests),
            memory_fraction=memory_fraction,
            tokenizer=False,
        )
        backend = VllmBackend(peer, load_format="dummy" if subject.path is None else "auto")
        rows = []
        for concurrency in concurrencies:
            load = measure_load(backend, requests, concurrency)
            row = Row.of(
                load,
                floor_ms=floor_ms,
                engine="vllm",
                decoder="ar",
                model=subject.name,
                concurrency=concurrency,
                n=1,
                memory_gib=memory_in_use(device),
            )
            rows.append(row)
        return rows, backend.stats().as_row()


def longest_of(requests: Sequence[DecodeRequest]) -> int:
    """Tokens of the longest prompt and response."""
    return max(len(request.prompt_ids) + request.max_new_tokens for request in requests)


def measure_load(backend: Backend, requests: Sequence[DecodeRequest], concurrency: int) -> Load:
    """A closed loop over `workload`, after one of shorter answers that warms up what is timed."""
    timed = workload(requests, concurrency)
    closed_loop(backend, [replace(request, max_new_tokens=8) for request in timed], concurrency)
    return closed_loop(backend, timed, concurrency)


def workload(requests: Sequence[DecodeRequest], concurrency: int) -> list[DecodeRequest]:
    """The requests, repeated where needed: twice as many as fly at a time, and 8 at least if there are so many."""
    count = max(2 * concurrency, min(8, len(requests)))
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
