"""The benchmark's report, made from the results alone: one HTML file and the same as Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cllm.ablation.document import AblationDocument
from cllm.artifacts import write_atomic
from cllm.bench.compare import Answered, Row, answered, compare
from cllm.bench.judged import JudgeResults
from cllm.bench.matrix_results import MatrixResults
from cllm.errors import InputError
from cllm.report.ablation_sections import ablation_sections
from cllm.report.categories import categories_section
from cllm.report.cells import cells_section, untimed_section
from cllm.report.energy import energy_section
from cllm.report.judged_section import judged_section, mt_bench_scores
from cllm.report.missing import missing_section
from cllm.report.page import Absent, Section, Table, Value, as_html, as_markdown
from cllm.report.paper_tables import paper_sections
from cllm.report.scaling import scaling_plots, scaling_section
from cllm.report.served import ServedDocument
from cllm.report.served_sections import served_sections
from cllm.report.sources import Sources, sources_section
from cllm.report.summary import summary_of, why_no_vllm
from cllm.report.tradeoff import tradeoff_section

HTML_NAME = "report.html"
MARKDOWN_NAME = "report.md"


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that a report is made from."""

    results: MatrixResults
    ablations: Sequence[AblationDocument] = ()
    judged: Sequence[JudgeResults] = ()
    served: Sequence[ServedDocument] = ()


def write_report(
    results: MatrixResults,
    folder: Path,
    *,
    ablations: Sequence[AblationDocument] = (),
    judged: Sequence[JudgeResults] = (),
    served: Sequence[ServedDocument] = (),
) -> list[Path]:
    """Write both files; their paths.

    Raises:
        InputError: there is nothing to report, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot create the folder ({error.strerror})") from error
    title = f"Benchmark {', '.join(results.matrices)}" if results.matrices else "Ablation" if ablations else "Serving"
    sections = report_sections(Evidence(results, ablations, judged, served))
    summary = summary_of(compare(results.records), results)
    paths = [folder / HTML_NAME, folder / MARKDOWN_NAME]
    texts = (as_html(title, summary, sections), as_markdown(title, summary, sections))
    for path, text in zip(paths, texts, strict=True):
        write_atomic(path, text)
    return paths


def report_sections(evidence: Evidence) -> list[Section]:
    """What the results hold something for; the last section names the others, and what is missing for each.

    Raises:
        InputError: there is neither a record, nor a reason for having none, nor an ablation, nor anything of serving.
    """
    results = evidence.results
    if not (results.records or results.cannot_run or evidence.ablations or evidence.served):
        raise InputError("the results hold no cells: nothing to report")
    rows, untimed = compare(results.records), answered(results.records)
    sources = Sources.of([*rows, *untimed], evidence.ablations, evidence.judged, evidence.served)
    found = [
        *_cell_sections(rows, untimed, evidence, sources),
        *served_sections(evidence.served, sources),
        *ablation_sections(evidence.ablations, sources),
    ]
    last = (missing_section(results), sources_section(sources) if sources.numbers else None)
    sections = [section for section in (*found, *last) if isinstance(section, Section)]
    absent = [*_no_vllm(rows, results), *(section for section in found if isinstance(section, Absent))]
    return [*sections, *([_absent_section(absent)] if absent else [])]


def _cell_sections(
    rows: Sequence[Row], untimed: Sequence[Answered], evidence: Evidence, sources: Sources
) -> list[Section | Absent]:
    results = evidence.results
    if not (results.records or results.cannot_run):
        return [Absent("Everything that a benchmark measures", "no results of jobs/benchmark.py were given")]
    unclocked = [untimed_section(untimed, sources)] if untimed else []
    if not rows:
        why = "no cell was timed" if untimed else "no cell was finished"
        return [
            cells_section(rows, results, sources),
            *unclocked,
            Absent("All comparisons of speed", why),
        ]
    return [
        scaling_section(rows, sources),
        scaling_plots(rows),
        tradeoff_section(rows, sources),
        categories_section(rows, sources),
        judged_section(evidence.judged, sources),
        energy_section(rows, sources),
        cells_section(rows, results, sources),
        *unclocked,
        *paper_sections(rows, mt_bench_scores(evidence.judged), sources),
    ]


def _no_vllm(rows: Sequence[Row], results: MatrixResults) -> list[Absent]:
    if not rows or any(row.over_vllm is not None for row in rows):
        return []
    return [Absent("Comparison with vLLM", why_no_vllm(results))]


def _absent_section(absent: Sequence[Absent]) -> Section:
    lines = tuple((Value(section.title), Value(section.why)) for section in absent)
    return Section("Not in this report", (), (Table(("what", "why"), lines),))
