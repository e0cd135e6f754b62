"""Where figures are from: each command, commit and machine has a number, which stands beside the figures."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cllm.ablation.document import AblationDocument
from cllm.bench.compare import Answered, Row
from cllm.bench.judged import JudgeResults
from cllm.report.page import NOTHING, Section, Table, Value
from cllm.report.served import ServedDocument

COLUMN = "source"
_NOT_KNOWN = "not known"
_Origin = tuple[str, ...]
_TEXT = (
    "Column source of the other tables holds the numbers of these lines. Raw data: results.json (every cell with all "
    "repeats, scores and response hashes), the cells without what is given per prompt in results.parquet, "
    "ablation.json, judge.json, and what serving measured."
)


@dataclass(frozen=True, slots=True)
class Sources:
    """Numbers of origins, from 1, with how much is from each."""

    numbers: Mapping[_Origin, int]
    figures: Mapping[_Origin, Sequence[str]]
    by_cell: Mapping[tuple[str, ...], tuple[int, ...]]  # of all seeds of a cell

    @classmethod
    def of(
        cls,
        rows: Sequence[Row | Answered] = (),
        ablations: Sequence[AblationDocument] = (),
        judged: Sequence[JudgeResults] = (),
        served: Sequence[ServedDocument] = (),
    ) -> "Sources":
        """Of all that a report shows."""
        cells = Counter(_origin_of(row) for row in rows)
        figures: dict[_Origin, list[str]] = {origin: [f"{count} cells"] for origin, count in cells.items()}
        for what, provenance in (*_of_ablations(ablations), *_of_judges(judged), *_of_serving(served)):
            figures.setdefault(_origin(provenance, 0), []).append(what)
        numbers = {origin: number for number, origin in enumerate(figures, start=1)}
        by_cell: dict[tuple[str, ...], tuple[int, ...]] = {}
        for row in rows:
            name = _cell_name(row)
            by_cell[name] = (*by_cell.get(name, ()), numbers[_origin_of(row)])
        return cls(numbers, figures, by_cell)

    def of_row(self, row: Row | Answered) -> Value:
        """Of one cell with one seed."""
        return _value([self.numbers[_origin_of(row)]])

    def of_rows(self, rows: Iterable[Row]) -> Value:
        """Of cells, each with all its seeds."""
        return _value(number for row in rows for number in self.by_cell[_cell_name(row)])

    def of_provenances(self, provenances: Iterable[Mapping[str, Any]]) -> Value:
        """Of what is not a cell."""
        return _value(self.numbers[_origin(provenance, 0)] for provenance in provenances)


def sources_section(sources: Sources) -> Section:
    """One line for each command, commit and machine."""
    lines = tuple(
        (Value(str(number), number), *map(Value, origin), Value("; ".join(dict.fromkeys(sources.figures[origin]))))
        for origin, number in sources.numbers.items()
    )
    columns = (COLUMN, "hardware", "threads", "commit", "command", "versions", "figures")
    return Section("Where the figures are from", (_TEXT,), (Table(columns, lines, frozenset({COLUMN})),))


def _of_ablations(ablations: Sequence[AblationDocument]) -> Iterable[tuple[str, Mapping[str, Any]]]:
    for ablation in ablations:
        for index, source in enumerate(ablation.sources):
            own = sum(row.source == index for row in ablation.rows)
            further = sum(row.source == index for row in ablation.decoded)
            more = f", {further} more decodings" if further else ""
            yield f"{own} students, ablation {ablation.grid}{more}", source


def _of_judges(judged: Sequence[JudgeResults]) -> Iterable[tuple[str, Mapping[str, Any]]]:
    return ((f"ratings of {len(one.cells)} cells by {one.judge.title}", one.provenance) for one in judged)


def _of_serving(served: Sequence[ServedDocument]) -> Iterable[tuple[str, Mapping[str, Any]]]:
    return ((f"{one.kind} of {one.model}", one.provenance) for one in served)


def _origin_of(row: Row | Answered) -> _Origin:
    return _origin(row.provenance, row.cell.platform.threads)


def _origin(provenance: Mapping[str, Any], threads: int) -> _Origin:
    """Machine, threads (0: not known, or of no matter), commit, command and versions."""
    commit = str(provenance.get("commit", _NOT_KNOWN))[:12] + (" with changes" if provenance.get("dirty") else "")
    versions = ", ".join(f"{name} {version}" for name, version in provenance.get("versions", {}).items())
    command = " ".join(provenance.get("command", ()))
    machine = _machine(provenance.get("hardware"))
    return machine, str(threads or NOTHING.text), commit, command or _NOT_KNOWN, versions or _NOT_KNOWN


def _machine(hardware: Mapping[str, Any] | None) -> str:
    if hardware is None:
        return _NOT_KNOWN
    gpus = (f"{count} × {name}" if count > 1 else name for name, count in Counter(hardware["gpus"]).items())
    return " + ".join([*gpus, f"{hardware['cores']:g} cores of {hardware['cpu']}, {hardware['memory_gib']:g} GiB"])


def _cell_name(row: Row | Answered) -> tuple[str, ...]:
    return row.group, row.cell.model, row.cell.method.label, str(row.cell.concurrency)


def _value(numbers: Iterable[int]) -> Value:
    found = sorted(set(numbers))
    return Value(", ".join(map(str, found)), found[0]) if found else NOTHING
