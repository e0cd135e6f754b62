"""Speed, latency and energy of a cell's timed repeats."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from cllm.bench.energy import EnergyCounter
from cllm.bench.served import Served, percentile, serve
from cllm.decoding.backend import Backend
from cllm.decoding.records import DecodeRequest

_PERCENTILES = (50, 90, 99)
Passes = Sequence[Sequence[DecodeRequest]]  # one, or two where conversations go on


@dataclass(frozen=True, slots=True)
class Speeds:
    """What repeats of one load took; as `cllm.bench.result.CellResult` has it. Nothing where there were none."""

    tokens_per_s: tuple[float, ...] = ()
    energy_j: tuple[float, ...] = ()
    latency_ms: dict[str, float] = field(default_factory=dict)
    step_ms: float | None = None


def time_repeats(
    backend: Backend, passes: Passes, *, concurrency: int, repeats: int, energy: EnergyCounter | None
) -> Speeds:
    """Serve the passes one after the other, `repeats` times; the time of a repeat is that of all its passes."""
    if repeats == 0:
        return Speeds()
    found, joules, steps = [], [], []
    for _ in range(repeats):
        before = energy() if energy else 0.0
        served = [serve(backend, requests, concurrency) for requests in passes]
        repeat: Served = sum(served[1:], start=served[0])
        found.append(repeat)
        steps += [part.load.step_ms for part in served if part.load.step_ms is not None]
        if energy:
            joules.append((energy() - before) / repeat.load.tokens)
    seconds = [value for repeat in found for value in repeat.seconds]
    return Speeds(
        tokens_per_s=tuple(repeat.load.tokens_per_s for repeat in found),
        energy_j=tuple(joules),
        latency_ms={f"p{percent}": 1000 * percentile(seconds, percent) for percent in _PERCENTILES},
        step_ms=median(steps) if steps else None,
    )
