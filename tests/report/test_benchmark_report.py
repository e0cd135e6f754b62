"""The benchmark's report says what the results say, in HTML and in Markdown, and names what they do not hold."""

import re
from pathlib import Path

import pytest

from cllm.bench.matrices import get_matrix
from cllm.bench.matrix_results import write_record, write_results
from cllm.errors import InputError
from cllm.report.benchmark import Evidence, report_sections, write_report
from cllm.report.documents import read_ablation
from jobs.report import main
from tests.bench.records import AR, BLOCK, failed_record, make_cell, make_record, make_result, make_results
from tests.report.ablations import write_ablation
from tests.report.measured import DRAFT, spider_results
from tests.report.reading import page_of

NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


def test_all_cells_hold_their_figures(tmp_path: Path):
    page, markdown = page_of(spider_results(), tmp_path)
    rows = {(row["model"], row["method"], row["in flight"]): row for row in page.table("p99 ms")}
    assert len(rows) == 15
    row = rows["cllm", BLOCK.label, "1"]
    assert row["tokens/s"] == "350 (315–385)"
    assert row["× AR"] == "3.50 (2.86–4.28)"
    assert row["× vLLM AR"] == "4.38 (3.58–5.35)"
    assert row["accuracy (95% CI)"] == "50.0% (15.0–85.0)"
    assert row["− teacher AR, points"] == "+0.0 (-32.7 to +32.7) ≈"
    assert (row["tokens/forward"], row["same tokens as AR"], row["p99 ms"]) == ("3.50", "100.0%", "30")
    assert row["mJ/token"] == "143 (114–171)"
    assert "≈" not in row["× AR"]
    assert "≈" in rows["teacher", BLOCK.label, "1"]["× AR"]
    assert "15 cells measured, 1 failed." in page.text
    assert "| 350 (315–385) | 3.50 (2.86–4.28) | 4.38 (3.58–5.35) | 3.50 |" in markdown


def test_columns_without_a_figure_are_left_out(tmp_path: Path):
    page, _ = page_of(make_results(make_record()), tmp_path)
    (row,) = page.table("p99 ms")
    assert not {"× vLLM AR", "mJ/token", "run"} & row.keys()


def test_speed_against_the_load_is_over_vllm(tmp_path: Path):
    page, _ = page_of(spider_results(), tmp_path)
    rows = {(row["model"], row["method"]): row for row in page.table("× at 1", "× at 8")}
    found = rows["cllm", BLOCK.label]
    assert (found["× at 1"], found["× at 8"]) == ("4.38", "2.50")
    assert found["accuracy (95% CI)"].startswith("50.0%")
    assert rows["teacher", "transformers generate"]["× at 8"] == "–"


def test_energy_is_compared_within_an_engine(tmp_path: Path):
    page, _ = page_of(spider_results(), tmp_path)
    rows = {(row["model"], row["method"]): row for row in page.table("mJ at 1")}
    assert (rows["teacher", "ar"]["mJ at 1"], rows["teacher", "ar"]["× AR at 1"]) == ("500", "1.00")
    assert (rows["cllm", BLOCK.label]["mJ at 8"], rows["cllm", BLOCK.label]["× AR at 8"]) == ("31.2", "0.50")
    assert rows["teacher", DRAFT.label]["× AR at 1"] == "0.50"  # over vLLM's AR, 625 mJ


def test_failures_and_obstacles_are_shown(tmp_path: Path):
    page, markdown = page_of(spider_results(), tmp_path)
    failed, obstacle = page.table("cells", "what", "why")
    assert (failed["what"], failed["why"]) == ("failed", "<script>out of memory</script>")
    assert list(obstacle.values()) == ["gsm8k-small cllm", "cannot run", "no weights"]
    assert "no weights" in markdown


def test_what_is_not_there_is_named_with_its_reason(tmp_path: Path):
    page, _ = page_of(spider_results(), tmp_path)
    why = {row["what"]: row["why"] for row in page.tables_of("what", "why")}
    assert [what.partition(":")[0] for what in why] == [
        "MT-bench by a judge",
        "The paper's Table 1",
        "The paper's Table 4",
        "The paper's Figure 3",
        "The paper's loss ablation, and which settings matter",
    ]
    poor, _ = page_of(make_results(make_record(make_cell(AR), make_result(scores=()))), tmp_path)
    poor_why = {row["what"]: row["why"] for row in poor.tables_of("what", "why")}
    assert why.keys() < poor_why.keys()
    assert poor_why["Comparison with vLLM"] == "no cell of its AR decoding is among these results"
    headings = [text for text in why if f">{text}</h2>" in (tmp_path / "report.html").read_text()]
    assert headings == []


def test_everything_in_the_markdown_is_in_the_page(tmp_path: Path):
    ablation = read_ablation(write_ablation(tmp_path / "a") / "ablation.json")
    page, markdown = page_of(spider_results(), tmp_path, ablations=[ablation])
    numbers = set(NUMBER.findall(markdown))
    assert len(numbers) > 300
    assert numbers <= set(NUMBER.findall(page.text))


def test_the_page_loads_nothing_and_runs_nothing_of_the_data(tmp_path: Path):
    page, _ = page_of(spider_results(), tmp_path)
    tags = [tag for tag, _ in page.attributes]
    anchors = {attributes["id"] for tag, attributes in page.attributes if tag == "section"}
    links = [attributes["href"] for tag, attributes in page.attributes if tag == "a"]
    assert len(anchors) == len(links) > 10
    assert {f"#{anchor}" for anchor in anchors} == set(links)
    assert not any("src" in attributes or "xlink:href" in attributes for _, attributes in page.attributes)
    assert not {"link", "img", "iframe", "object"} & set(tags)
    assert tags.count("script") == 1
    assert not re.search(r"url\(|@import|https?://", (tmp_path / "report.html").read_text())
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.attributes


def test_the_same_results_give_the_same_bytes(tmp_path: Path):
    first = [path.read_bytes() for path in write_report(spider_results(), tmp_path / "a")]
    assert [path.read_bytes() for path in write_report(spider_results(), tmp_path / "b")] == first


def test_without_a_finished_cell_the_reasons_remain(tmp_path: Path):
    page, _ = page_of(make_results(failed_record(make_cell(), "lost")), tmp_path)
    assert "0 cells measured, 1 failed." in page.text
    assert "lost" in page.text
    with pytest.raises(InputError, match="nothing to report"):
        report_sections(Evidence(make_results()))


def test_one_table_shows_all_seeds_and_the_others_the_first(tmp_path: Path):
    records = [make_record(make_cell(seed=seed), make_result((100.0 + seed,) * 3)) for seed in (3, 4)]
    page, _ = page_of(make_results(*records), tmp_path)
    assert [row["seed"] for row in page.table("p99 ms")] == ["3", "4"]
    assert "Here are seeds 3, 4; all other sections show seed 3." in page.text
    assert len(page.table("× at 1")) == 1


def test_the_job_reports_on_benchmarks_and_ablations(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    measured, ablated, out = tmp_path / "measured", tmp_path / "ablated", tmp_path / "report"
    results = spider_results()
    for record in results.records:
        write_record(measured, record)
    write_results(measured, get_matrix("demo"), results.cannot_run)
    write_ablation(ablated)
    for folders, title in (([measured, ablated], "# Benchmark demo"), ([ablated], "# Ablation")):
        assert main([*map(str, folders), "--out", str(out)]) == 0
        assert capsys.readouterr().out.split() == [str(out / name) for name in ("report.html", "report.md")]
        markdown = (out / "report.md").read_text()
        assert markdown.startswith(title)
        assert "34 students, ablation demo" in markdown


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("nothing.txt", "", "results.json: no such file; run jobs/benchmark.py"),
        ("ablation.json", "{", "ablation.json: not a readable JSON file"),
        ("ablation.json", '{"schema_version": 9}', "schema version 9, this code reads 1; run jobs/ablate.py again"),
    ],
)
def test_the_job_says_in_one_line_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, message: str
):
    (tmp_path / name).write_text(text)
    assert main([str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path}")
    assert message in line
