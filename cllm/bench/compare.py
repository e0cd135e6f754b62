"""Records of the matrix -> rows with their comparisons: speed-ups, equality with AR, differences of accuracy.

Cells are timed one after the other, so a ratio of two speeds carries the spread of both: it lies between the slowest
repeat of one over the fastest of the other, and the reverse. Scores are compared prompt by prompt.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from cllm.bench.matrix import Cell, LoadConfig
from cllm.bench.methods import VllmMethod
from cllm.bench.result import CellRecord, CellResult
from cllm.config import digest
from cllm.evaluation.metrics import Estimate, accuracy, paired_difference
from cllm.evaluation.subject import SUBJECTS, SubjectName

_Asked = tuple[str, str, str, str, int, str]
_KINDS = ("ar", "jacobi", "lookahead", "transformers", "vllm")


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio of two speeds: of the medians, and the range that the repeats allow."""

    value: float
    low: float
    high: float

    @property
    def within_noise(self) -> bool:
        """Whether the ranges of the two overlap, so that the repeats do not tell which is faster."""
        return self.low <= 1 <= self.high and self.low < self.high


@dataclass(frozen=True, slots=True)
class Row:
    """A finished and timed cell and what it is compared with; None where the other cell is not there.

    Attributes:
        group: rows of one group answer the same prompts in the same way on the same device.
        provenance: where the cell is from: commit, versions, hardware, command, time.
        accuracy: with its 95% interval; None where nothing was scored.
        tokens_per_s: median, slowest and fastest repeat.
        joules: for a new token; median, lowest and highest repeat.
        speedup: over AR of the same engine with the same model and load.
        over_vllm: over vLLM's AR decoding of the same model.
        over_transformers: over `generate` of transformers, which is what the papers compare with.
        joules_over_ar: energy of a token over that of AR, same engine, model and load.
        identical: share of responses with the same tokens as our AR decoding of the same model.
        minus_teacher: paired difference of the scores to those of the teacher by AR.
        floor_share: tokens a second over those of AR steps that take as long as copying the weights.
    """

    cell: Cell
    result: CellResult
    group: str
    provenance: Mapping[str, Any]
    accuracy: Estimate | None
    tokens_per_s: Estimate
    joules: Estimate | None
    speedup: Ratio | None
    over_vllm: Ratio | None
    over_transformers: Ratio | None
    joules_over_ar: Ratio | None
    identical: float | None
    minus_teacher: Estimate | None
    floor_share: float

    @property
    def differs_from_teacher(self) -> bool:
        """Whether the scores tell the two apart."""
        difference = self.minus_teacher
        return difference is not None and not difference.low <= 0 <= difference.high


@dataclass(frozen=True, slots=True)
class Answered:
    """A finished cell that was not timed (`LoadConfig.repeats` 0). Its fields are those of `Row`."""

    cell: Cell
    result: CellResult
    group: str
    provenance: Mapping[str, Any]
    accuracy: Estimate | None
    identical: float | None
    minus_teacher: Estimate | None


def compare(records: Sequence[CellRecord]) -> list[Row]:
    """A row for every timed record but superseded ones: by run, task, device, load, model, concurrency and method."""
    finished = _finished(records, timed=True)
    baselines, groups = _Baselines(finished), _groups([record.cell for record in finished])
    return [_row(record, baselines, groups[_asked(record.cell)]) for record in finished]


def answered(records: Sequence[CellRecord]) -> list[Answered]:
    """The same of the records that were not timed; they are compared among themselves."""
    finished = _finished(records, timed=False)
    baselines, groups = _Baselines(finished), _groups([record.cell for record in finished])
    return [_answered(record, baselines, groups[_asked(record.cell)]) for record in finished]


def newest(records: Sequence[CellRecord]) -> list[CellRecord]:
    """The finished records, without those that a later measurement replaces.

    A folder keeps the cells of weights, prompts, scorers and versions that are no longer the run's. Beside the new ones
    they would look like the same measurement with another outcome. Another load is another measurement.
    """
    in_time = sorted((record for record in records if record.result is not None), key=_time)
    current = {_subject(record.cell): _state(record.cell) for record in in_time}
    kept = [record for record in in_time if _state(record.cell) == current[_subject(record.cell)]]
    return list({_measured(record.cell): record for record in kept}.values())


def speed_ratio(speeds: Sequence[float], baseline: Sequence[float]) -> Ratio:
    """Repeats of one over repeats of the other."""
    value = median(speeds) / median(baseline)
    return Ratio(value, min(speeds) / max(baseline), max(speeds) / min(baseline))


def chance_apart(repeats: int, baseline: int) -> float:
    """How often the repeats of two equal speeds do not overlap, so that chance looks like a difference.

    All orders of the repeats are equally likely then, and in two of them one side lies wholly above the other.
    """
    return 2 / math.comb(repeats + baseline, repeats)


def sampling_text(load: LoadConfig) -> str:
    return "greedy" if load.temperature == 0 else f"temperature {load.temperature:g}, top-p {load.top_p:g}"


def threads_text(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


def _time(record: CellRecord) -> str:
    return str(record.provenance.get("time", ""))


def _subject(cell: Cell) -> tuple[object, ...]:
    """What measurements of one model have in common, whenever they were made."""
    return *_asked(cell), cell.model


def _state(cell: Cell) -> tuple[str, ...]:
    return cell.weights, cell.data, cell.scorer, cell.tokenizer, cell.precision


def _measured(cell: Cell) -> tuple[object, ...]:
    return *_subject(cell), cell.method.label, cell.concurrency, cell.seed


def _asked(cell: Cell) -> _Asked:
    """Whom, what, where and how much."""
    load = digest(cell.load.model_dump(mode="json"))
    return cell.run, cell.task, cell.test, cell.platform.device, cell.platform.threads, load


def _finished(records: Sequence[CellRecord], *, timed: bool) -> list[CellRecord]:
    kept = [record for record in newest(records) if record.result and bool(record.result.tokens_per_s) == timed]
    return sorted(kept, key=lambda record: _place(record.cell))


def _groups(cells: Sequence[Cell]) -> dict[_Asked, str]:
    """Names of what cells are asked, as long as it takes to tell them apart."""
    first = {_asked(cell): cell for cell in cells}
    names = {asked: _group_name(cell) for asked, cell in first.items()}
    for more in (_test_text, _load_text):
        known = list(names.values())
        names = {asked: name + more(first[asked]) * (known.count(name) > 1) for asked, name in names.items()}
    return names


def _group_name(cell: Cell) -> str:
    platform = cell.platform
    threads = f", {threads_text(platform.threads)}" if platform.threads else ""
    sampling = f", {sampling_text(cell.load)}" if cell.load.temperature else ""
    return f"{cell.run}, {cell.task}, {platform.device}{threads}{sampling}"


def _test_text(cell: Cell) -> str:
    return ", another test set" if cell.test else ""


def _load_text(cell: Cell) -> str:
    load = cell.load
    timed = f", {load.timed_prompts(cell.concurrency)} of them {load.repeats} times" if load.timed else ""
    return f", {load.num_prompts} prompts{timed}, at most {load.max_new_tokens} new tokens"


class _Baselines:
    """Results by what a comparison needs to be the same."""

    def __init__(self, finished: Sequence[CellRecord]) -> None:
        self._results = {
            self._name(record.cell, record.cell.model, _baseline_name(record.cell)): record.result
            for record in finished
        }

    def find(self, cell: Cell, name: str, model: SubjectName | None = None) -> CellResult | None:
        return self._results.get(self._name(cell, model or cell.model, name))

    @staticmethod
    def _name(cell: Cell, model: SubjectName, name: str) -> tuple[object, ...]:
        same = cell.data, cell.scorer, cell.precision, cell.seed, cell.concurrency
        return *_asked(cell), *same, model, name


def _place(cell: Cell) -> tuple[object, ...]:
    kind = _KINDS.index(cell.method.kind)
    order = SUBJECTS.index(cell.model), cell.concurrency, kind, cell.method.label, cell.seed
    run, task, test, device, threads, load = _asked(cell)
    return run, task, test, device, threads, cell.load.temperature, cell.load.top_p, load, *order


def _baseline_name(cell: Cell) -> str:
    """ "ar", "vllm" or "transformers" for the cells that others are compared with, and a name of its own for others."""
    if isinstance(cell.method, VllmMethod) and cell.method.method == "ar":
        return "vllm"
    return cell.method.kind if cell.method.kind in ("ar", "transformers") else cell.key


def _row(record: CellRecord, baselines: _Baselines, group: str) -> Row:
    cell, result = record.cell, record.result
    assert result is not None
    ar, vllm, generate = (baselines.find(cell, name) for name in ("ar", "vllm", "transformers"))
    same_engine = vllm if cell.engine == "vllm" else ar
    speed = _middle(result.tokens_per_s)
    return Row(
        cell=cell,
        result=result,
        group=group,
        provenance=record.provenance,
        accuracy=accuracy(result.scores) if result.scores else None,
        tokens_per_s=speed,
        joules=_middle(result.energy_j) if result.energy_j else None,
        speedup=_over(result, same_engine),
        over_vllm=_over(result, vllm),
        over_transformers=_over(result, generate),
        joules_over_ar=_energy_over(result, same_engine),
        identical=_identical(result, ar),
        minus_teacher=_minus(result, baselines.find(cell, "ar", "teacher")),
        floor_share=speed.mean * result.floor_ms / 1000 / cell.concurrency,
    )


def _answered(record: CellRecord, baselines: _Baselines, group: str) -> Answered:
    cell, result = record.cell, record.result
    assert result is not None
    return Answered(
        cell=cell,
        result=result,
        group=group,
        provenance=record.provenance,
        accuracy=accuracy(result.scores) if result.scores else None,
        identical=_identical(result, baselines.find(cell, "ar")),
        minus_teacher=_minus(result, baselines.find(cell, "ar", "teacher")),
    )


def _middle(repeats: Sequence[float]) -> Estimate:
    return Estimate(median(repeats), min(repeats), max(repeats))


def _over(result: CellResult, baseline: CellResult | None) -> Ratio | None:
    if baseline is result:
        return Ratio(1, 1, 1)
    return None if baseline is None else speed_ratio(result.tokens_per_s, baseline.tokens_per_s)


def _energy_over(result: CellResult, baseline: CellResult | None) -> Ratio | None:
    if baseline is None or not result.energy_j or not baseline.energy_j:
        return None
    return Ratio(1, 1, 1) if baseline is result else speed_ratio(result.energy_j, baseline.energy_j)


def _minus(result: CellResult, teacher: CellResult | None) -> Estimate | None:
    if teacher is None or teacher is result or not result.scores or not teacher.scores:
        return None
    return paired_difference(result.scores, teacher.scores)


def _identical(result: CellResult, ar: CellResult | None) -> float | None:
    if ar is None:
        return None
    pairs = zip(result.response_digests, ar.response_digests, strict=True)
    return fmean(mine == other for mine, other in pairs)
