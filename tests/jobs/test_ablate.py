"""The ablation job: killed and started again it ends with the same students and repeats none; failures are shown."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from cllm.ablation.cell import Figures
from cllm.ablation.data import BaseRun, cut_trajectories, placed
from cllm.ablation.document import AblationDocument, read_document
from cllm.ablation.results import read_figures
from cllm.ablation.student import make_student
from cllm.artifacts import write_artifact
from cllm.decoding.trajectories import Trajectory, from_table, read_table
from cllm.engine.collection import collect
from cllm.layout import RunLayout
from cllm.recipes import get_recipe
from cllm.training.session import read_trajectories
from jobs import ablate, stages
from jobs.cli import EXIT_PARTS_FAILED
from jobs.collect import Teacher
from tests.jobs.running import FinishedRun, killed_job, run_job

pytestmark = pytest.mark.ray
ALL_STUDENTS = 2 * 3 + 1  # seeds × (centre, less data, smaller blocks), and both of the latter with the first seed
ALL_CELLS = ALL_STUDENTS + 4  # those of the table are decoded with the other n as well


def settings(run: FinishedRun, output: Path) -> tuple[str, ...]:
    return (f'base={{"recipe": "debug", "overrides": {json.dumps(run.overrides)}}}', f"output={output}", "seeds=[0, 1]")


def times(folder: Path) -> dict[str, int]:
    """When each finished student was written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in (folder / "cells").glob("*/manifest.json")}


@dataclass(frozen=True, slots=True)
class Resumed:
    """An ablation that was killed, lost a student's other decoding, and was started again; times by name."""

    overrides: tuple[str, ...]
    folder: Path
    lost: tuple[str, Figures]
    when_killed: dict[str, int]
    last_line: dict[str, object]

    @property
    def document(self) -> AblationDocument:
        return read_document(self.folder / "ablation.json")


@pytest.fixture(scope="module")
def resumed(pipeline: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Resumed:
    folder = tmp_path_factory.mktemp("ablate")
    overrides = settings(pipeline, folder / "results")
    with killed_job("ablate", overrides, cwd=folder, flag="--grid") as job:
        job.wait_until(lambda: len(times(folder / "results")) >= 2)
        job.kill()
    lost = lose_a_decoding(folder / "results")
    when_killed = times(folder / "results")
    done = run_job("ablate", overrides, cwd=folder, flag="--grid")
    assert done.returncode == 0, done.stderr[-4000:]
    return Resumed(overrides, folder / "results", lost, when_killed, json.loads(done.stdout.splitlines()[-1]))


def lose_a_decoding(folder: Path) -> tuple[str, Figures]:
    """Remove the first student's figures with another n than that of its training."""
    for path in (folder / "cells").glob("*/manifest.json"):
        cell = json.loads(path.read_text())["inputs"]
        if cell["evaluate"]["block_size"] != cell["collect"]["block_size"]:
            figures = read_figures(path.parent)
            shutil.rmtree(path.parent)
            return path.parent.name, figures
    raise AssertionError("no student was decoded with another n")


def test_the_kill_came_in_the_middle(resumed: Resumed) -> None:
    assert 1 <= len(resumed.when_killed) < ALL_CELLS - 1


def test_all_students_are_there_and_none_was_made_twice(resumed: Resumed) -> None:
    now, document = times(resumed.folder), resumed.document
    assert {name: now[name] for name in resumed.when_killed} == resumed.when_killed
    assert (len(document.rows), len(now)) == (ALL_STUDENTS, ALL_CELLS)
    students: dict[str, set[str]] = {}
    for row in (*document.rows, *document.decoded):
        students.setdefault(f"{row.settings} {row.seed}", set()).add(row.key)
    assert set().union(*students.values()) == now.keys()
    kept = sum(keys <= resumed.when_killed.keys() for keys in students.values())
    wanted = {"students": ALL_STUDENTS, "kept": kept, "failed": []}
    assert wanted.items() <= resumed.last_line.items()


def test_every_student_is_decoded_with_the_n_of_its_training_and_some_with_another(resumed: Resumed) -> None:
    document = resumed.document
    assert all(row.window == row.settings["n"] for row in document.rows)
    other = {(row.settings["data"], row.settings["n"], row.seed, row.window) for row in document.decoded}
    assert other == {(data, n, 0, 12 - n) for data in (1.0, 0.25) for n in (8, 4)}
    assert document.sources[document.rows[0].source]["command"][0].endswith("ablate.py")


def test_a_decoding_that_was_lost_is_of_the_same_student(resumed: Resumed) -> None:
    """Weights are not kept, so it was trained again."""
    key, lost = resumed.lost
    assert key not in resumed.when_killed
    again = read_figures(resumed.folder / "cells" / key)
    assert (again.tpf, again.scores, again.reference_perplexity) == (lost.tpf, lost.scores, lost.reference_perplexity)


def test_document_figure_and_page_are_written_from_what_was_kept(resumed: Resumed) -> None:
    assert {path.name for path in resumed.folder.iterdir()} == {
        "ablation.json", "ablation.md", "effects.svg", "cells", "data",
    }  # fmt: skip
    optim = get_recipe("debug").train.optim
    tokens = optim.steps * optim.rows_per_step * optim.row_tokens
    assert {row.train_tokens for row in resumed.document.rows} == {tokens}
    assert "7 students of the run `debug`" in (resumed.folder / "ablation.md").read_text()


def test_a_failed_student_is_shown_and_the_centre_of_another_grid_is_kept(resumed: Resumed, tmp_path: Path) -> None:
    overrides = (*resumed.overrides, *of_rates(1e-3, 1e30), "seeds=[1]")
    job = run_job("ablate", overrides, cwd=tmp_path, flag="--grid")
    assert job.returncode == EXIT_PARTS_FAILED, job.stderr[-4000:]
    last = json.loads(job.stdout.splitlines()[-1])
    assert (last["students"], last["kept"]) == (2, 1)
    (failed,) = last["failed"]
    assert failed.startswith("rate=1e+30: step ")
    assert "lower optim.learning_rate" in failed
    assert f"- {failed}" in (resumed.folder / "ablation.md").read_text()
    assert len(times(resumed.folder)) == ALL_CELLS


def of_rates(*rates: float) -> tuple[str, ...]:
    """A grid of learning rates alone."""
    levels = [{"value": rate, "overrides": [f"train.optim.learning_rate={rate}"]} for rate in rates]
    return f'factors=[{{"name": "rate", "levels": {json.dumps(levels)}}}]', "table=null", "windows=[]"


def test_a_student_whose_worker_always_dies_is_shown_and_the_others_are_made(
    pipeline: FinishedRun, tmp_path: Path
) -> None:
    overrides = (*settings(pipeline, tmp_path / "results"), *of_rates(1e-3, 2e-3), "seeds=[0]")
    killed: set[int] = set()

    def first_is_done() -> bool:
        for worker in job.find("ray::StudentWorker.make"):
            killed.add(worker.pid)
            worker.kill()
        return "[1/2]" in job.log.read_text()

    with killed_job("ablate", overrides, cwd=tmp_path, flag="--grid") as job:
        job.wait_until(first_is_done)
        assert job.wait() == EXIT_PARTS_FAILED
        last = json.loads(job.log.read_text().splitlines()[-1])
    assert len(killed) >= ablate.MAX_DEATHS
    (failed,) = last["failed"]
    assert failed.startswith("centre: its worker died 3 times (")
    document = read_document(tmp_path / "results" / "ablation.json")
    assert ([row.settings for row in document.rows], document.missing) == ([{"rate": 2e-3}], (failed,))


def test_the_cut_is_what_decoding_fewer_prompts_gives(resumed: Resumed, pipeline: FinishedRun) -> None:
    """Row for row, with all states."""
    recipe = pipeline.recipe.with_overrides(["collect.num_prompts=12", "collect.shard_prompts=12"])
    teacher = Teacher.load(recipe)
    (prompts,) = teacher.shards
    decoded, _ = collect(teacher.engine, teacher.tokenizer, prompts, recipe.collect, recipe.seed)
    data = [from_folder(path) for path in (resumed.folder / "data").glob("*/trajectories")]
    assert sorted(len(rows) for rows in data) == [12, 12, 48, 48]
    assert sorted(decoded, key=lambda row: row.prompt_id) in data


def from_folder(folder: Path) -> list[Trajectory]:
    return [row for path in sorted(folder.glob("part-*.parquet")) for row in from_table(read_table(path)[0])]


def test_a_student_is_a_function_of_its_seed(pipeline: FinishedRun, tmp_path: Path) -> None:
    base = BaseRun.read(pipeline.recipe)
    recipe = placed(pipeline.recipe, base, tmp_path)
    output = stages.collect(recipe)
    ids = {row.prompt_id for row in read_trajectories(pipeline.recipe, states=False)}
    with write_artifact(output.path, kind=output.kind, inputs=output.inputs, provenance={}) as folder:
        cut_trajectories(pipeline.layout.trajectories, folder, ids)
    one, again, other = (make_student(recipe, seed, [recipe.evaluate], torch.device("cpu"))[0] for seed in (0, 0, 1))
    assert one.reference_perplexity == again.reference_perplexity != other.reference_perplexity
    assert (one.tpf, one.scores) == (again.tpf, again.scores)
    assert one.tpf >= 1
    assert len(one.scores) == recipe.evaluate.num_prompts
    assert not RunLayout.of(recipe).student.exists()


def refused(capsys: pytest.CaptureFixture[str], words: Sequence[str]) -> str:
    """The one line of a job that must not start."""
    assert ablate.main(words) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == ""
    return line


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("--grid nosuch: unknown; known are demo, small, debug", ["--grid", "nosuch"]),
        ("unknown key 'speed'", ["--grid", "debug", "--set", "speed=1"]),
        (
            "grid debug, w=-1: --set: train.loss.ar_weight: Input should be greater than or equal to 0",
            ["--grid", "debug", "--set", "table=null", "--set", "windows=[]",
             "--set", 'factors=[{"name": "w", "levels": [{"value": 1, "overrides": []}, '
             '{"value": -1, "overrides": ["train.loss.ar_weight=-1"]}]}]'],
        ),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_before_anything_starts(
    message: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, words)
    assert line.startswith("error: ")
    assert message in line


def test_a_missing_base_run_is_named_with_its_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = json.dumps({"recipe": "debug", "overrides": [f"output={tmp_path / 'none'}"]})
    line = refused(capsys, ["--grid", "debug", "--set", f"base={base}", "--set", f"output={tmp_path / 'results'}"])
    assert "no such output folder" in line
    assert line.endswith(f"python jobs/pipeline.py --recipe debug --set output={tmp_path / 'none'}")
    assert list(tmp_path.iterdir()) == []
