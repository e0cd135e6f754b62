"""The benchmark job: killed twice and started again, it ends with the same cells and repeats none; failures show."""

import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest

from cllm.bench.matrices import get_matrix
from cllm.bench.matrix_results import MatrixResults, read_results
from cllm.bench.methods import obstacle
from cllm.layout import RunLayout
from cllm.report.benchmark import write_report
from jobs import benchmark, lanes
from jobs.cli import EXIT_PARTS_FAILED
from tests.bench.runs import make_scored_run
from tests.jobs.running import FinishedRun, killed_job, run_job

pytestmark = pytest.mark.ray
MATRIX = get_matrix("debug")
ALL_CELLS = len(MATRIX.models) * sum(
    obstacle(method, concurrency=concurrency, temperature=0) is None
    for method, concurrency in product(MATRIX.methods, MATRIX.concurrencies)
)


def settings(run: FinishedRun, output: Path) -> tuple[str, ...]:
    runs = json.dumps([{"recipe": "debug", "overrides": list(run.overrides)}])
    return (f"runs={runs}", f"output={output}")


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "cells").glob("*.json")}


@dataclass(frozen=True, slots=True)
class Killed:
    """A benchmark that was killed twice.

    Attributes:
        early, late: what could be reported after the first kill, before any cell, and after the second one.
        times: when cells' files were written, by name, after the second one.
        log: what the second job printed, which lost a worker.
    """

    overrides: tuple[str, ...]
    folder: Path
    early: MatrixResults
    late: MatrixResults
    times: dict[str, int]
    log: str


@pytest.fixture(scope="module")
def killed(pipeline: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    folder = tmp_path_factory.mktemp("benchmark")
    results = folder / "results"
    overrides = settings(pipeline, results)
    with killed_job("benchmark", overrides, cwd=folder, flag="--matrix") as job:
        job.wait_until((results / "results.json").exists)
        job.kill()
    early = read_results([results])
    with killed_job("benchmark", overrides, cwd=folder, flag="--matrix") as job:
        job.wait_until(lambda: len(times(results)) >= 1)
        for worker in job.find("ray::CellWorker"):
            worker.kill()
        before = len(times(results))
        job.wait_until(lambda: len(times(results)) >= before + 2)
        job.kill()
        log = job.log.read_text()
    return Killed(overrides, results, early, read_results([results]), times(results), log)


@pytest.fixture(scope="module")
def resumed(killed: Killed) -> MatrixResults:
    """The same benchmark, started again and left alone."""
    (killed.folder / "cells" / ".left.json.1.tmp").write_text("half a file")
    # Cells are timed alone on the machine, so the job gets a Ray of its own: in a shared one it would wait for whatever
    # another test has left running.
    done = run_job("benchmark", killed.overrides, cwd=killed.folder.parent, flag="--matrix")
    assert done.returncode == 0, done.stderr[-4000:]
    return read_results([killed.folder])


def test_the_kills_came_before_and_amid_the_cells(killed: Killed) -> None:
    assert len(killed.early.records) < 2
    assert 2 <= len(killed.times) < ALL_CELLS


def test_what_a_killed_job_left_can_be_reported(killed: Killed, tmp_path: Path) -> None:
    assert killed.early.matrices == ("debug",)
    assert {f"{record.key}.json" for record in killed.late.done} == killed.times.keys()
    write_report(killed.late, tmp_path)
    assert f"{len(killed.late.done)} cells measured" in (tmp_path / "report.md").read_text()


def test_a_lost_worker_is_replaced_and_its_cell_measured(killed: Killed) -> None:
    assert killed.log.count("trying once more") == 1
    (again,) = [record for record in killed.late.records if record.attempts > 1]
    assert (again.status, again.attempts) == ("done", 2)


def test_all_cells_are_there_and_none_was_measured_twice(killed: Killed, resumed: MatrixResults) -> None:
    now = times(killed.folder)
    assert {name: now[name] for name in killed.times} == killed.times
    assert len({record.cell.title for record in resumed.done}) == len(now) == ALL_CELLS
    assert resumed.failed == []


def test_the_report_is_written_from_what_was_kept(killed: Killed, resumed: MatrixResults) -> None:
    assert {path.name for path in killed.folder.iterdir()} == {
        "cells", "report.html", "report.md", "results.json", "results.parquet", "rows.json",
    }  # fmt: skip
    assert f"{ALL_CELLS} cells measured, 0 failed" in (killed.folder / "report.md").read_text()
    rows = json.loads((killed.folder / "rows.json").read_text())["rows"]
    assert {row["key"] for row in rows} == {record.key for record in resumed.done}


def test_nothing_is_measured_when_all_is_there(killed: Killed, resumed: MatrixResults, tmp_path: Path) -> None:
    before = times(killed.folder)
    again = run_job("benchmark", killed.overrides, cwd=tmp_path, flag="--matrix")
    assert again.returncode == 0, again.stderr[-4000:]
    assert times(killed.folder) == before
    last = json.loads(again.stdout.splitlines()[-1])
    assert (last["cells"], last["kept"], last["failed"]) == (ALL_CELLS, ALL_CELLS, [])
    told = [line for line in again.stdout.splitlines() if line.startswith("cannot run: ")]
    assert len(told) == last["cannot_run"] == len(resumed.cannot_run)


def test_a_cell_that_takes_too_long_fails_and_is_shown(tmp_path: Path) -> None:
    run = make_scored_run(tmp_path / "run")
    overrides = (f"output={run.output}", f"task.databases={run.output}/databases")
    runs = json.dumps([{"recipe": "debug", "overrides": overrides}])
    less = ('methods=[{"kind":"ar"},{"kind":"transformers"}]', 'models=["teacher"]', "concurrencies=[2]")
    changed = (f"runs={runs}", f"output={tmp_path / 'results'}", *less, "cell_minutes=0.0001")
    job = run_job("benchmark", changed, cwd=tmp_path, flag="--matrix")
    assert job.returncode == EXIT_PARTS_FAILED, job.stderr[-4000:]
    (failed,) = read_results([tmp_path / "results"]).records
    assert (failed.status, failed.attempts, failed.error) == ("failed", 2, "no result after cell_minutes=0.0001")
    lines = job.stdout.splitlines()
    assert "cannot run: debug teacher transformers generate c=2: decodes one request at a time" in lines
    assert "debug teacher ar c=2: no result after cell_minutes=0.0001; trying once more" in lines


def test_a_cell_that_fails_is_tried_again_and_shown(tmp_path: Path) -> None:
    run = make_scored_run(tmp_path / "run")
    weights = RunLayout.of(run).student / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    overrides = (f"output={run.output}", f"task.databases={run.output}/databases")
    runs = json.dumps([{"recipe": "debug", "overrides": overrides}])
    changed = (f"runs={runs}", f"output={tmp_path / 'results'}", 'methods=[{"kind":"ar"}]', "concurrencies=[1]")
    job = run_job("benchmark", changed, cwd=tmp_path, flag="--matrix")
    assert job.returncode == EXIT_PARTS_FAILED, job.stderr[-4000:]
    done, failed = sorted(read_results([tmp_path / "results"]).records, key=lambda record: record.status)
    assert (done.cell.model, done.attempts) == ("teacher", 1)
    assert (failed.cell.model, failed.attempts, failed.status) == ("cllm", lanes.MAX_ATTEMPTS, "failed")
    assert failed.error is not None
    assert "no usable model" in failed.error
    assert failed.error in (tmp_path / "results" / "report.md").read_text()
    assert "trying once more" in job.stdout


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("--matrix nosuch: unknown", ["--matrix", "nosuch"]),
        ("unknown key 'speed'", ["--matrix", "debug", "--set", "speed=1"]),
        ("gpus: the matrix asks for 64 GPUs", ["--matrix", "debug", "--set", "gpus=64"]),
    ],
)
def test_bad_input_is_one_line(
    message: str, words: list[str], local_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_a_matrix_of_runs_that_are_not_there(tmp_path: Path) -> None:
    overrides = (f"output={tmp_path}", _absent_run(tmp_path))
    job = run_job("benchmark", overrides, cwd=tmp_path, flag="--matrix")
    assert job.returncode == 2
    assert "no cell can run" in job.stderr.splitlines()[-1]


def _absent_run(folder: Path) -> str:
    return f"runs={json.dumps([{'recipe': 'debug', 'overrides': [f'output={folder}']}])}"
