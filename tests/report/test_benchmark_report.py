"""The benchmark's report says what the results say, in HTML and in Markdown, and names what they do not hold."""

import re
from pathlib import Path

import pytest

from cllm.ablation.document import read_document
from cllm.bench.matrices import get_matrix
from cllm.bench.matrix import LoadConfig
from cllm.bench.matrix_results import write_record, write_results
from cllm.bench.result import CellRecord, EngineFacts
from cllm.errors import InputError
from cllm.evaluation.metrics import accuracy
from cllm.report.benchmark import Evidence, report_sections, write_report
from jobs.report import main
from tests.bench.records import (
    AR,
    BLOCK,
    PROVENANCE,
    VLLM,
    failed_record,
    make_cell,
    make_record,
    make_result,
    make_results,
)
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
    assert (found["× at 1"], found["× at 8"]) == ("4.38 (3.58–5.35)", "2.50 (2.05–3.06)")
    assert "decodes one request at a time" in page.text
    assert found["accuracy (95% CI)"].startswith("50.0%")
    assert rows["teacher", "transformers generate"]["× at 8"] == "–"


def test_energy_is_compared_within_an_engine(tmp_path: Path):
    page, _ = page_of(spider_results(), tmp_path)
    rows = {(row["model"], row["method"]): row for row in page.table("mJ at 1")}
    assert (rows["teacher", "ar"]["mJ at 1"], rows["teacher", "ar"]["× AR at 1"]) == ("500 (400–600)", "1.00")
    found = rows["cllm", BLOCK.label]
    assert (found["mJ at 8"], found["× AR at 8"]) == ("31.2 (25.0–37.5)", "0.50 (0.33–0.75)")
    assert rows["teacher", DRAFT.label]["× AR at 1"] == "0.50 (0.33–0.75)"  # over vLLM's AR, 625 mJ


def test_failures_and_obstacles_are_shown(tmp_path: Path):
    page, markdown = page_of(spider_results(), tmp_path)
    failed, obstacle = page.table("cells", "what", "why")
    (left_out,) = page.table("asked of", "what", "why")
    assert (failed["what"], failed["why"]) == ("failed", "<script>out of memory</script>")
    assert list(obstacle.values()) == ["gsm8k-small cllm", "cannot run", "no weights"]
    assert "no weights" in markdown
    assert list(left_out.values()) == ["spider-small", "left out", "1 of 5 prompts: longer than the model reads"]
    assert "Entries of the matrix that cannot run: 1." in page.text


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
    ablation = read_document(write_ablation(tmp_path / "a") / "ablation.json")
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


def test_one_table_shows_all_seeds_and_the_others_take_them_together(tmp_path: Path):
    page, _ = page_of(make_results(*two_seeds()), tmp_path)
    assert [row["seed"] for row in page.table("p99 ms") if row["method"] == BLOCK.label] == ["3", "4"]
    assert "Seeds 3, 4 stand here one by one. The other sections take them together" in page.text
    _, row = page.table("× at 1")
    # Seed 3 is twice, seed 4 three times as fast as AR; of each pair the repeats lie 5% around the median.
    assert row["× at 1"] == "2.50 (1.81–3.32)"
    assert row["source"] == "1, 2"
    # Right by prompt: 1/2, 1/2, 0, 0 of the two seeds, so 25% of 4 prompts and not of 8.
    low, high = 100 * accuracy((0.5, 0.5, 0, 0)).low, 100 * accuracy((0.5, 0.5, 0, 0)).high
    assert row["accuracy (95% CI)"] == f"25.0% ({low:.1f}–{high:.1f})"
    assert row["− teacher AR, points"].startswith("-25.0 (")


def two_seeds() -> list[CellRecord]:
    """AR, which is always right on half of the prompts, and Jacobi decoding, whose second seed never is."""
    later = PROVENANCE | {"commit": "later"}
    speeds = {(AR, 3): 100.0, (AR, 4): 100.0, (BLOCK, 3): 200.0, (BLOCK, 4): 300.0}
    found = []
    for (method, seed), speed in speeds.items():
        scores = (0.0,) * 4 if (method, seed) == (BLOCK, 4) else (1.0, 1.0, 0.0, 0.0)
        result = make_result((0.95 * speed, speed, 1.05 * speed), scores=scores)
        provenance = later if seed == 4 else PROVENANCE
        found.append(make_record(make_cell(method, seed=seed), result, provenance=provenance))
    return found


def test_every_cell_names_its_command_commit_and_machine(tmp_path: Path):
    """Cells of two commits in one folder: each row has the number of its own."""
    gpus = PROVENANCE["hardware"] | {"gpus": ["Test GPU"] * 2}
    later = PROVENANCE | {"commit": "fedcba9876543210", "hardware": gpus}
    records = [make_record(make_cell(AR)), make_record(make_cell(BLOCK), provenance=later)]
    page, _ = page_of(make_results(*records), tmp_path)
    sources = {row["source"]: row for row in page.table("source", "commit")}
    commits = {row["method"]: sources[row["source"]]["commit"] for row in page.table("p99 ms")}
    assert commits == {"ar": "0123456789ab", BLOCK.label: "fedcba987654"}
    assert sources["2"]["hardware"] == "2 × Test GPU + 2 cores of test cpu, 8 GiB"
    assert [row["source"] for row in page.table("draft or heads")] == ["1", "2"]
    assert [row["source"] for row in page.table("× at 1")] == ["1", "2"]


def test_one_table_holds_memory_parameters_and_the_engine(tmp_path: Path):
    facts = {"package": "vllm", "version": "0.29.0", "runner": "V1", "scheduling": "async", "guesses": 5}
    engine = EngineFacts(**facts, steps=10, proposed=50, accepted=20)
    served = make_result(memory_gib=1.25, device_memory_gib=70.0, trained_parameters=500_000, engine=engine)
    page, _ = page_of(make_results(make_record(), make_record(make_cell(VLLM), served)), tmp_path)
    rows = {row["method"]: row for row in page.table("p99 ms")}
    row = rows[VLLM.label]
    assert (row["needs, GiB"], row["device in use, GiB"], row["trained parameters"]) == ("1.25", "70.0", "500.0K")
    assert (row["served by"], row["scheduling"], row["guesses held"]) == ("vllm 0.29.0 runner V1", "async", "40.0%")
    assert (rows["ar"]["needs, GiB"], rows["ar"]["served by"], rows["ar"]["guesses held"]) == ("–", "cllm 0", "–")


def test_cells_without_times_have_a_table_of_their_own(tmp_path: Path):
    load = LoadConfig(num_prompts=4, max_new_tokens=8, repeats=0)
    result = make_result((), latency_ms={}, floor_ms=0.0)
    records = [make_record(make_cell(method, load=load), result) for method in (AR, BLOCK)]
    page, _ = page_of(make_results(*records), tmp_path)
    assert [row["method"] for row in page.table("group", "accuracy (95% CI)")] == ["ar", BLOCK.label]
    assert "0 cells measured, 0 failed." in page.text
    assert "2 cells were not timed." in page.text
    assert "more are not shown" not in page.text


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
        assert "31 students, ablation demo, 18 more decodings" in markdown  # of the first seed
        assert "8 students, ablation demo" in markdown


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("nothing.txt", "", "results.json: no such file; run jobs/benchmark.py"),
        ("ablation.json", "{", "ablation.json: not a readable JSON file"),
        ("ablation.json", '{"schema_version": 9}', "schema version 9, this code reads 2; update this code"),
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
