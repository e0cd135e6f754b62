"""Records of the matrix -> rows with their comparisons: speed-ups, equality with AR, differences of accuracy.

Cells are timed one after the other, so a ratio of two speeds carries the spread of both: it lies between the slowest
repeat of one over the fastest of the other, and the reverse. Scores are compared prompt by prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

from cllm.bench.matrix import Cell
from cllm.bench.matrix_results import CellRecord, CellResult
from cllm.bench.methods import VllmMethod
from cllm.config import digest
from cllm.evaluation.metrics import Estimate, accuracy, paired_difference
from cllm.evaluation.subject import SUBJECTS

_KINDS = ("ar", "jacobi", "lookahead", "transformers", "vllm")


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio of two speeds: of the medians, and the range that the repeats allow."""

    value: float
    low: float
    high: float

    @property
    def within_noise(self) -> bool:
        """Whether the repeats do not tell which of the two is faster."""
        return self.low <= 1 <= self.high and self.low < self.high


@dataclass(frozen=True, slots=True)
class Row:
    """A finished cell and what it is compared with; None where the other cell is not there.

    Attributes:
        speedup: over AR of the same engine with the same model and load.
        over_vllm: over vLLM's AR decoding.
        over_transformers: over `generate` of transformers, which is what the papers compare with.
        identical: share of responses with the same tokens as our AR decoding of the same model.
        minus_teacher: paired difference of the scores to those of the teacher by AR.
        floor_share: tokens a second over those of AR steps that take as long as copying the weights.
    """

    cell: Cell
    result: CellResult
    accuracy: Estimate
    tokens_per_s: Estimate
    speedup: Ratio | None
    over_vllm: Ratio | None
    over_transformers: Ratio | None
    identical: float | None
    minus_teacher: Estimate | None
    floor_share: float

    @property
    def differs_from_teacher(self) -> bool:
        """Whether the scores tell the two apart."""
        difference = self.minus_teacher
        return difference is not None and not difference.low <= 0 <= difference.high


def compare(records: Sequence[CellRecord]) -> list[Row]:
    """A row for every finished record: by run, device, model, requests in flight and method."""
    finished = [(record.cell, record.result) for record in records if record.result is not None]
    baselines = _Baselines(finished)
    return [_row(cell, result, baselines) for cell, result in sorted(finished, key=lambda pair: _place(pair[0]))]


def speed_ratio(speeds: Sequence[float], baseline: Sequence[float]) -> Ratio:
    """Repeats of one over repeats of the other."""
    value = median(speeds) / median(baseline)
    return Ratio(value, min(speeds) / max(baseline), max(speeds) / min(baseline))


class _Baselines:
    """Results by what a comparison needs to be the same."""

    def __init__(self, finished: Sequence[tuple[Cell, CellResult]]) -> None:
        self._results = {self._name(cell, cell.model, _baseline_name(cell)): result for cell, result in finished}

    def find(self, cell: Cell, name: str, model: str | None = None) -> CellResult | None:
        return self._results.get(self._name(cell, model or cell.model, name))

    @staticmethod
    def _name(cell: Cell, model: str, name: str) -> tuple[object, ...]:
        load = digest(cell.load.model_dump(mode="json"))
        return cell.run, cell.data, cell.platform.device, load, cell.seed, cell.concurrency, model, name


def _place(cell: Cell) -> tuple[object, ...]:
    kind = _KINDS.index(cell.method.kind)
    return (
        cell.run,
        cell.platform.device,
        SUBJECTS.index(cell.model),
        cell.concurrency,
        kind,
        cell.method.label,
        cell.seed,
    )


def _baseline_name(cell: Cell) -> str:
    """ "ar", "vllm" or "transformers" for the cells that others are compared with, and a name of its own for others."""
    if isinstance(cell.method, VllmMethod) and cell.method.method == "ar":
        return "vllm"
    return cell.method.kind if cell.method.kind in ("ar", "transformers") else cell.key


def _row(cell: Cell, result: CellResult, baselines: _Baselines) -> Row:
    speeds = result.tokens_per_s
    middle = median(speeds)
    ar = baselines.find(cell, "ar")
    vllm, generate = baselines.find(cell, "vllm"), baselines.find(cell, "transformers")
    teacher = baselines.find(cell, "ar", "teacher")
    same_engine = vllm if cell.engine == "vllm" else ar
    return Row(
        cell=cell,
        result=result,
        accuracy=accuracy(result.scores),
        tokens_per_s=Estimate(middle, min(speeds), max(speeds)),
        speedup=_over(result, same_engine),
        over_vllm=_over(result, vllm),
        over_transformers=_over(result, generate),
        identical=_identical(result, ar),
        minus_teacher=None if teacher in (None, result) else paired_difference(result.scores, teacher.scores),
        floor_share=middle * result.floor_ms / 1000 / cell.concurrency,
    )


def _over(result: CellResult, baseline: CellResult | None) -> Ratio | None:
    if baseline is result:
        return Ratio(1, 1, 1)
    return None if baseline is None else speed_ratio(result.tokens_per_s, baseline.tokens_per_s)


def _identical(result: CellResult, ar: CellResult | None) -> float | None:
    if ar is None:
        return None
    pairs = zip(result.response_digests, ar.response_digests, strict=True)
    return fmean(mine == other for mine, other in pairs)
