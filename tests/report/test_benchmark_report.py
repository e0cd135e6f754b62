"""The benchmark's report says what the results say, in HTML that parses and in Markdown."""

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cllm.bench.matrices import get_matrix
from cllm.bench.matrix import Obstacle
from cllm.bench.matrix_results import MatrixResults, write_record, write_results
from cllm.bench.methods import LookaheadMethod, TransformersMethod
from cllm.errors import InputError
from cllm.report.benchmark import report_sections, write_report
from cllm.report.lines import line_plot
from cllm.report.page import Section, Table, Value, as_html, as_markdown
from cllm.report.published import TASKS
from jobs.report import main
from tests.bench.records import AR, BLOCK, failed_record, make_cell, make_record, make_result, make_results

VOID = {"meta", "br", "circle", "line", "polyline"}


class Reader(HTMLParser):
    """Collects tables, and fails where tags are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.attributes.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture
def results() -> MatrixResults:
    counts = {"fast_forwarded": 1.1, "stationary": 0.5}
    spider = {"run": "spider-small", "task": "spider"}
    return make_results(
        make_record(make_cell(AR, **spider), make_result((90.0, 100.0, 120.0), reference_perplexity=1.25)),
        make_record(make_cell(BLOCK, **spider), make_result((95.0, 105.0, 115.0), **counts)),
        make_record(make_cell(TransformersMethod(), **spider), make_result((50.0, 50.0, 50.0))),
        make_record(
            make_cell(BLOCK, model="cllm", **spider),
            make_result((300.0, 350.0, 400.0), tpf=3.5, fast_forwarded=3.3, stationary=2.0),
        ),
        make_record(make_cell(AR, model="cllm", **spider), make_result((99.0, 100.0, 101.0))),
        failed_record(make_cell(LookaheadMethod(), **spider), "<script>out of memory</script>"),
        cannot_run=(Obstacle(run="gsm8k-small", model="cllm", why="no weights"),),
    )


def page_of(results: MatrixResults, folder: Path) -> tuple[Reader, str]:
    html, markdown = write_report(results, folder)
    return read(html.read_text()), markdown.read_text()


def test_the_matrix_holds_the_figures(results: MatrixResults, tmp_path: Path):
    page, markdown = page_of(results, tmp_path)
    head, *rows = page.tables[0]
    found = {(row[1], row[0]): dict(zip(head, row, strict=True)) for row in rows}
    assert len(found) == 5
    row = found["cllm", BLOCK.label]
    assert row["tokens/s"] == "350 (300–400)"
    assert row["× AR"] == "3.50"
    assert row["tokens/forward"] == "3.50"
    assert row["accuracy (95% CI)"].startswith("50.0% (15.0–85.0)")
    assert "× vLLM AR" not in row  # nothing to show in any row
    assert row["same tokens as AR"] == "100.0%"
    assert row["p99 ms"] == "30"
    assert "| 350 (300–400) | 3.50 | 3.50 | 50.0% (15.0–85.0) |" in markdown


def test_differences_within_noise_are_marked(results: MatrixResults, tmp_path: Path):
    page, markdown = page_of(results, tmp_path)
    head, *rows = page.tables[0]
    marks = {(row[1], row[0]): "≈" in row[head.index("× AR")] for row in rows}
    assert marks["teacher", BLOCK.label]
    assert not marks["cllm", BLOCK.label]
    assert not marks["teacher", "ar"]
    assert "1.05 ≈" in markdown


def test_failures_and_obstacles_are_shown(results: MatrixResults, tmp_path: Path):
    page, markdown = page_of(results, tmp_path)
    (table,) = [table for table in page.tables if table[0] == ["cells", "what", "why"]]
    assert [row[1] for row in table[1:]] == ["failed", "cannot run"]
    assert "out of memory" in table[1][2]
    assert table[2] == ["gsm8k-small cllm", "cannot run", "no weights"]
    assert "no weights" in markdown


def test_published_values_stand_beside_ours_where_they_are_the_same_quantity(results: MatrixResults, tmp_path: Path):
    page, _ = page_of(results, tmp_path)
    gsm8k, spider = [table for table in page.tables if "our tok/s" in table[0]]
    assert len(gsm8k) == 1 + 16
    ours = gsm8k[0].index("our tok/s")
    assert {row[ours] for row in gsm8k[1:]} == {"–"}
    lines = {(row[0], row[1], row[2]): dict(zip(spider[0], row, strict=True)) for row in spider[1:]}
    line = lines["Spider", "CLLM", "Jacobi"]
    assert (line["tok/s"], line["× AR"], line["sure?"]) == ("127.4", "3.4", "F")
    assert (line["our tok/s"], line["our × AR"], line["our metric"]) == ("350", "3.50", "50.0%")
    assert lines["Spider", "target", "Jacobi"]["× transformers"] == "2.10"
    assert lines["Spider", "target", "Medusa-2"]["our tok/s"] == "–"
    assert lines["CodeSearchNet-Python", "CLLM", "Jacobi"]["our tok/s"] == "–"


def test_token_counts_are_held_against_the_target_model(results: MatrixResults, tmp_path: Path):
    page, _ = page_of(results, tmp_path)
    (table,) = [table for table in page.tables if "fast-forwarded an iteration" in table[0]]
    assert [row[1:] for row in table[1:]] == [
        ["teacher", BLOCK.label, "1.10", "1.00", "0.50", "1.0"],
        ["cllm", BLOCK.label, "3.30", "3.00", "2.00", "4.0"],
    ]


def test_the_page_is_self_contained_and_safe(results: MatrixResults, tmp_path: Path):
    page, _ = page_of(results, tmp_path)
    for tag, attributes in page.attributes:
        assert not {"src", "href"} & attributes.keys(), tag
    assert [tag for tag, _ in page.attributes].count("script") == 1
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.attributes
    assert "prefers-color-scheme: dark" in page.text


def test_the_same_results_give_the_same_bytes(results: MatrixResults, tmp_path: Path):
    first = [path.read_bytes() for path in write_report(results, tmp_path / "a")]
    assert [path.read_bytes() for path in write_report(results, tmp_path / "b")] == first


def test_without_a_finished_cell_the_reasons_remain(tmp_path: Path):
    results = make_results(failed_record(make_cell(), "lost"))
    page, _ = page_of(results, tmp_path)
    assert "0 cells measured, 1 failed" in page.text
    assert "lost" in page.text
    with pytest.raises(InputError, match="nothing to report"):
        report_sections(make_results())


def test_cells_of_tables_are_escaped():
    section = Section("<b>", ("a & b",), (Table(("x|y",), ((Value("1|2<3", 1.0),),), frozenset({"x|y"})),))
    assert "1|2&lt;3" in as_html("t", [section])
    assert "1\\|2<3" in as_markdown("t", [section])


def test_plots_are_well_formed_and_to_scale():
    svg = line_plot({"a & b": [(1, 0.0), (4, 8.0)], "c": [(2, 4.0)]}, x_label="n", y_label="tokens")
    root = ET.fromstring(svg)
    points = [tuple(map(float, pair.split(","))) for pair in root.find("polyline").get("points").split()]  # type: ignore[union-attr]
    (left, low), (right, high) = points
    middle = list(root.iter("circle"))[2]
    # 2 lies halfway between 1 and 4 in powers of two, and 4 halfway between 0 and 8.
    assert float(middle.get("cx", 0)) == pytest.approx((left + right) / 2, abs=0.1)
    assert float(middle.get("cy", 0)) == pytest.approx((low + high) / 2, abs=0.1)
    assert re.search(">a &amp; b<", svg)
    assert ET.fromstring(line_plot({"one": [(1, 3.0)]}, x_label="n", y_label="y")) is not None


def test_published_speedups_fit_their_speeds():
    """Guards against slips in copying: each speed-up is the ratio to the target model's AR, to the digit it has."""
    for task in TASKS:
        baseline = next(row for row in task.rows if (row.model, row.method) == ("target", "AR"))
        for row in task.rows:
            assert row.tokens_per_s / baseline.tokens_per_s == pytest.approx(row.speedup, abs=0.1), (task.title, row)


def test_the_job_reports_on_folders(results: MatrixResults, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for record in results.records:
        write_record(tmp_path, record)
    write_results(tmp_path, get_matrix("demo"), results.cannot_run)
    assert main([str(tmp_path), "--out", str(tmp_path / "report")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "report" / name) for name in ("report.html", "report.md")]


def test_the_job_says_in_one_line_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(tmp_path / "nowhere")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: {tmp_path / 'nowhere' / 'results.json'}: no such file; run jobs/benchmark.py"
