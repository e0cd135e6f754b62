"""The benchmark job: killed and started again it ends with the same cells and repeats none; failures are shown."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from cllm.bench.matrix_results import MatrixResults, read_results
from cllm.layout import RunLayout
from jobs import benchmark
from jobs.cli import EXIT_PARTS_FAILED
from tests.bench.runs import make_scored_run
from tests.jobs.running import FinishedRun, killed_job, run_job

pytestmark = pytest.mark.ray
ALL_CELLS = 2 * (3 * 2 + 1)  # models × (methods at both concurrencies, and lookahead at one)


def settings(run: FinishedRun, output: Path) -> tuple[str, ...]:
    runs = json.dumps([{"recipe": "debug", "overrides": list(run.overrides)}])
    return (f"runs={runs}", f"output={output}")


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "cells").glob("*.json")}


@dataclass(frozen=True, slots=True)
class Resumed:
    """A benchmark that was killed and then started again; modification times by file name."""

    overrides: tuple[str, ...]
    folder: Path
    when_killed: dict[str, int]
    results: MatrixResults


@pytest.fixture(scope="module")
def resumed(pipeline: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Resumed:
    folder = tmp_path_factory.mktemp("benchmark")
    overrides = settings(pipeline, folder / "results")
    with killed_job("benchmark", overrides, cwd=folder, flag="--matrix") as job:
        job.wait_until(lambda: len(times(folder / "results")) >= 2)
        job.kill()
    when_killed = times(folder / "results")
    (folder / "results" / "cells" / ".left.json.1.tmp").write_text("half a file")
    # Cells are timed alone on the machine, so the job gets a Ray of its own: in a shared one it would wait for whatever
    # another test has left running.
    done = run_job("benchmark", overrides, cwd=folder, flag="--matrix")
    assert done.returncode == 0, done.stderr[-4000:]
    return Resumed(overrides, folder / "results", when_killed, read_results([folder / "results"]))


def test_the_kill_came_in_the_middle(resumed: Resumed) -> None:
    assert 2 <= len(resumed.when_killed) < ALL_CELLS


def test_all_cells_are_there_and_none_was_measured_twice(resumed: Resumed) -> None:
    now = times(resumed.folder)
    assert {name: now[name] for name in resumed.when_killed} == resumed.when_killed
    assert len({record.cell.title for record in resumed.results.done}) == len(now) == ALL_CELLS
    assert resumed.results.failed == []


def test_the_report_is_written_from_what_was_kept(resumed: Resumed) -> None:
    assert {path.name for path in resumed.folder.iterdir()} == {
        "cells", "report.html", "report.md", "results.json", "results.parquet",
    }  # fmt: skip
    assert f"{ALL_CELLS} cells measured, 0 failed" in (resumed.folder / "report.md").read_text()


def test_nothing_is_measured_when_all_is_there(resumed: Resumed, tmp_path: Path) -> None:
    before = times(resumed.folder)
    again = run_job("benchmark", resumed.overrides, cwd=tmp_path, flag="--matrix")
    assert again.returncode == 0, again.stderr[-4000:]
    assert times(resumed.folder) == before
    last = json.loads(again.stdout.splitlines()[-1])
    assert (last["cells"], last["kept"], last["failed"]) == (ALL_CELLS, ALL_CELLS, [])


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
    assert (failed.cell.model, failed.attempts, failed.status) == ("cllm", benchmark.MAX_ATTEMPTS, "failed")
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
