"""Speeds that results files hold, as rates for an estimate.

Read are the documents of `jobs/evaluate.py`, `jobs/bench_engine.py` and `jobs/bench_distill.py`, and those of the first
and the last in one. All of them measure one GPU, or one machine without GPUs.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cllm.errors import InputError
from cllm.report.prices import Price

Basis = Literal["measured", "assumed"]
_STUDENT = "cllm"


@dataclass(frozen=True, slots=True)
class Rate:
    """Tokens a second of one GPU, or of one machine without GPUs; whether that was measured, and where it is from."""

    tokens_per_s: float
    basis: Basis
    source: str

    def __post_init__(self) -> None:
        if not 0 < self.tokens_per_s < math.inf:
            raise InputError(f"{self.source}: a speed must be positive and finite, got {self.tokens_per_s:g} tokens/s")


@dataclass(frozen=True, slots=True)
class Speed:
    """One measured row.

    Attributes:
        model: its name in the document.
        decoder: ar, jacobi-block, jacobi-sliding or another name of an engine's decoder.
        concurrency: requests decoded together.
    """

    model: str
    decoder: str
    concurrency: int
    rate: Rate


def read_speeds(path: Path, price: Price, ratio: float | None) -> list[Speed]:
    """The speeds in a results file, as they are to be expected on the machine of `price`.

    Args:
        ratio: speed of the priced machine's device over the measured one; needed where they differ, and then the rates
            are assumed ones.

    Raises:
        InputError: no such file, not one of the kinds, or another device than the machine's without a ratio.
    """
    document = _load(path)
    device, hardware = _device(document, path)
    same = (price.gpu is None and not hardware["gpus"]) or (price.gpu is not None and price.gpu in device)
    if not same and ratio is None:
        raise InputError(
            f"{path}: measured on {device}, {price.instance} has {price.gpu or 'no GPU'}; "
            "give --speed-ratio, the speed of the latter over that of the former"
        )
    source = f"{path.name} on {device}" + ("" if ratio is None else f" × {ratio:g}")
    basis: Basis = "measured" if ratio is None else "assumed"
    try:
        return [
            Speed(model, decoder, concurrency, Rate(tokens_per_s * (ratio or 1), basis, source))
            for model, decoder, concurrency, tokens_per_s in _rows(document)
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a results file of this project ({error!r:.80})") from None


def collection_rate(speeds: Sequence[Speed], batch_size: int) -> Rate | None:
    """The teacher's block decoding with as many rows as are decoded together; None if nobody measured it."""
    rows = [speed for speed in speeds if speed.decoder == "jacobi-block" and speed.model != _STUDENT]
    return _slowest(_fullest(rows, batch_size))


def evaluation_rate(speeds: Sequence[Speed], batch_size: int) -> Rate | None:
    """The slowest decoder with `batch_size` rows: evaluation runs them all."""
    return _slowest(_fullest(speeds, batch_size))


def timing_rate(speeds: Sequence[Speed]) -> Rate | None:
    """The slowest decoder, one prompt at a time."""
    return _slowest([speed for speed in speeds if speed.concurrency == 1])


def serving_rate(speeds: Sequence[Speed]) -> Rate | None:
    """The fastest row with a sliding window: what a busy replica reaches. The student's rows, where there are such."""
    rows = [speed for speed in speeds if speed.decoder.startswith("jacobi") and speed.decoder != "jacobi-block"]
    rows = [speed for speed in rows if speed.model == _STUDENT] or rows
    return max((speed.rate for speed in rows), key=lambda rate: rate.tokens_per_s, default=None)


def _load(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(document, dict):
        raise InputError(f"{path}: not a results file of this project (a {type(document).__name__})")
    return document


def _device(document: dict[str, Any], path: Path) -> tuple[str, dict[str, Any]]:
    """The measured device's name, and the hardware that the document tells of."""
    hardware = document.get("speed_hardware", document.get("hardware"))
    if hardware is None and "sources" in document:  # the flat table of a benchmark, which may come of several machines
        machines = [source.get("hardware") for source in document["sources"]]
        if any(machine != machines[0] for machine in machines):
            raise InputError(f"{path}: measured on several kinds of hardware; give a table of one of them")
        hardware = machines[0] if machines else None
    if not isinstance(hardware, dict) or not {"gpus", "cpu"} <= hardware.keys():
        raise InputError(f"{path}: does not say on what hardware it was measured")
    return (hardware["gpus"] or [hardware["cpu"]])[0], hardware


def _rows(document: dict[str, Any]) -> Iterator[tuple[str, str, int, float]]:
    """Model, decoder, concurrency and tokens a second of every row of ours."""
    if "collection" in document:
        batched = document["collection"]["batched"]
        yield "teacher", "jacobi-block", int(batched["prompts"]), float(batched["tokens_per_s"])
        if "rows" not in document:
            return
    for row in document["rows"]:
        if "engine" not in row:
            yield row["model"], row["method"], 1, float(row["tokens_per_s"])
        elif row["engine"] == "cllm":
            yield row["model"], row["decoder"], int(row["concurrency"]), float(row["tokens_per_s"])


def _fullest(speeds: Sequence[Speed], batch_size: int) -> list[Speed]:
    """Those with the most requests together that do not exceed the batch. A single request says nothing of a batch."""
    fitting = [speed for speed in speeds if min(2, batch_size) <= speed.concurrency <= batch_size]
    most = max((speed.concurrency for speed in fitting), default=0)
    return [speed for speed in fitting if speed.concurrency == most]


def _slowest(speeds: Sequence[Speed]) -> Rate | None:
    return min((speed.rate for speed in speeds), key=lambda rate: rate.tokens_per_s, default=None)
