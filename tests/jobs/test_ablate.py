"""The ablation job: killed and started again it ends with the same students and repeats none; failures are shown."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from cllm.ablation.data import BaseRun, cut_trajectories, placed
from cllm.ablation.student import make_student
from cllm.artifacts import write_artifact
from cllm.decoding.trajectories import Trajectory, from_table, read_table
from cllm.engine.collection import collect
from cllm.layout import RunLayout
from cllm.training.session import read_trajectories
from jobs import ablate, stages
from jobs.cli import EXIT_PARTS_FAILED
from jobs.collect import Teacher
from tests.jobs.running import FinishedRun, killed_job, run_job

pytestmark = pytest.mark.ray
ALL_STUDENTS = 2 * 3  # seeds × (centre, less data, smaller blocks)


def settings(run: FinishedRun, output: Path) -> tuple[str, ...]:
    return (f'base={{"recipe": "debug", "overrides": {json.dumps(run.overrides)}}}', f"output={output}", "seeds=[0, 1]")


def times(folder: Path) -> dict[str, int]:
    """When each finished student was written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in (folder / "cells").glob("*/manifest.json")}


@dataclass(frozen=True, slots=True)
class Resumed:
    """An ablation that was killed and then started again; times by name."""

    overrides: tuple[str, ...]
    folder: Path
    when_killed: dict[str, int]
    last_line: dict[str, object]

    @property
    def rows(self) -> list[dict[str, object]]:
        rows: list[dict[str, object]] = json.loads((self.folder / "ablation.json").read_text())["rows"]
        return rows


@pytest.fixture(scope="module")
def resumed(pipeline: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Resumed:
    folder = tmp_path_factory.mktemp("ablate")
    overrides = settings(pipeline, folder / "results")
    with killed_job("ablate", overrides, cwd=folder, flag="--grid") as job:
        job.wait_until(lambda: len(times(folder / "results")) >= 2)
        job.kill()
    when_killed = times(folder / "results")
    done = run_job("ablate", overrides, cwd=folder, flag="--grid")
    assert done.returncode == 0, done.stderr[-4000:]
    return Resumed(overrides, folder / "results", when_killed, json.loads(done.stdout.splitlines()[-1]))


def test_the_kill_came_in_the_middle(resumed: Resumed) -> None:
    assert 2 <= len(resumed.when_killed) < ALL_STUDENTS


def test_all_students_are_there_and_none_was_made_twice(resumed: Resumed) -> None:
    now = times(resumed.folder)
    assert {name: now[name] for name in resumed.when_killed} == resumed.when_killed
    assert {row["key"] for row in resumed.rows} == now.keys()
    assert len(now) == resumed.last_line["students"] == ALL_STUDENTS
    assert (resumed.last_line["kept"], resumed.last_line["failed"]) == (len(resumed.when_killed), [])


def test_document_figure_and_page_are_written_from_what_was_kept(resumed: Resumed) -> None:
    assert {path.name for path in resumed.folder.iterdir()} == {
        "ablation.json", "ablation.md", "effects.svg", "cells", "data",
    }  # fmt: skip
    distinct = {(json.dumps(row["settings"]), row["seed"]) for row in resumed.rows}
    assert len(distinct) == ALL_STUDENTS
    tokens = 10 * 2 * 512  # steps × rows × tokens of a row
    assert {row["train_tokens"] for row in resumed.rows} == {tokens}
    assert "6 students of the run `debug`" in (resumed.folder / "ablation.md").read_text()


def test_a_failed_student_is_shown_and_the_centre_of_another_grid_is_kept(resumed: Resumed, tmp_path: Path) -> None:
    levels = [{"value": rate, "overrides": [f"train.optim.learning_rate={rate}"]} for rate in (1e-3, 1e30)]
    overrides = (*resumed.overrides, f'factors=[{{"name": "rate", "levels": {json.dumps(levels)}}}]', "seeds=[1]")
    job = run_job("ablate", overrides, cwd=tmp_path, flag="--grid")
    assert job.returncode == EXIT_PARTS_FAILED, job.stderr[-4000:]
    last = json.loads(job.stdout.splitlines()[-1])
    assert (last["students"], last["kept"]) == (2, 1)
    (failed,) = last["failed"]
    assert failed.startswith("rate=1e+30: RuntimeError: step ")
    assert "lower the learning rate" in failed
    assert f"- {failed}" in (resumed.folder / "ablation.md").read_text()
    assert len(times(resumed.folder)) == ALL_STUDENTS


def test_the_cut_is_what_decoding_fewer_prompts_gives(resumed: Resumed, pipeline: FinishedRun) -> None:
    """Row for row, with all states."""
    recipe = pipeline.recipe.with_overrides(["collect.num_prompts=12", "collect.shard_prompts=12"])
    teacher = Teacher.load(recipe)
    (prompts,) = teacher.shards
    decoded, _ = collect(teacher.engine, teacher.tokenizer, prompts, recipe.collect, recipe.seed)
    data = [from_folder(path) for path in (resumed.folder / "data").glob("*/trajectories")]
    assert sorted(len(rows) for rows in data) == [12, 48, 48]
    assert min(data, key=len) == sorted(decoded, key=lambda row: row.prompt_id)


def from_folder(folder: Path) -> list[Trajectory]:
    return [row for path in sorted(folder.glob("part-*.parquet")) for row in from_table(read_table(path)[0])]


def test_a_student_is_a_function_of_its_seed(pipeline: FinishedRun, tmp_path: Path) -> None:
    base = BaseRun.read(pipeline.recipe)
    recipe = placed(pipeline.recipe, base, tmp_path)
    output = stages.collect(recipe)
    ids = {row.prompt_id for row in read_trajectories(pipeline.recipe, states=False)}
    with write_artifact(output.path, kind=output.kind, inputs=output.inputs, provenance={}) as folder:
        cut_trajectories(pipeline.layout.trajectories, folder, ids)
    one, again, other = (make_student(recipe, seed, torch.device("cpu")) for seed in (0, 0, 1))
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
            ["--grid", "debug", "--set", 'factors=[{"name": "w", "levels": [{"value": 1, "overrides": []}, '
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
