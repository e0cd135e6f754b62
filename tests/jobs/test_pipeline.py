"""The whole pipeline: its last line, its five outputs, and that a second run has nothing to do."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cllm.artifacts import input_difference, read_manifest
from cllm.decoding.records import DecodeRequest
from cllm.decoding.reference import autoregressive
from cllm.decoding.trajectories import Trajectory, from_table, read_table
from cllm.models import weights_revision
from cllm.tasks.prompts import tokenizer_hash
from jobs import stages
from tests.jobs.running import FinishedRun, run_job

pytestmark = pytest.mark.ray

STAGES = (stages.prepare, stages.finetune, stages.collect, stages.train, stages.evaluate)
REQUIRED = {"task", "teacher_accuracy", "cllm_accuracy", "tpf", "speedup_over_ar", "identical_to_ar", "seconds"}


def summary(stdout: str) -> dict[str, float | str]:
    return json.loads(stdout.splitlines()[-1])


def part_files(run: FinishedRun) -> list[Path]:
    return sorted(run.layout.trajectories.glob("part-*.parquet"))


def trajectories(run: FinishedRun) -> list[Trajectory]:
    return [row for path in part_files(run) for row in from_table(read_table(path)[0])]


def test_last_line_has_the_figures(pipeline: FinishedRun) -> None:
    figures = summary(pipeline.done.stdout)
    assert figures.keys() >= REQUIRED
    assert figures["task"] == "synthetic_sql"
    assert figures["identical_to_ar"] == 1.0  # float32 on the CPU: Jacobi decoding is exact


def test_no_stage_was_skipped_in_the_first_run(pipeline: FinishedRun) -> None:
    assert "up to date" not in pipeline.done.stdout
    assert pipeline.done.stdout.count(": done in ") == len(STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_every_output_is_valid_and_says_what_made_it(pipeline: FinishedRun, stage) -> None:
    output = stage(pipeline.recipe)
    manifest = read_manifest(output.path, output.kind)  # checks sizes and hashes
    assert input_difference(manifest, output.inputs) is None
    assert manifest.provenance.keys() >= {"commit", "versions", "hardware", "command", "time"}
    assert manifest.provenance["command"][0] == "jobs/pipeline.py"
    assert {file.path for file in manifest.files} == {
        path.relative_to(output.path).as_posix() for path in output.path.rglob("*") if path.is_file()
    } - {"manifest.json"}


def test_nothing_unfinished_is_left(pipeline: FinishedRun) -> None:
    assert {path.name for path in pipeline.layout.root.iterdir()} == {
        "prompts", "teacher", "trajectories", "student", "evaluation", "scratch"
    }  # fmt: skip


def test_student_is_a_plain_hugging_face_checkpoint(pipeline: FinishedRun) -> None:
    path = pipeline.layout.student
    model, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(report.values())  # no missing, unexpected or mismatched weights
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer("shop: list the names", return_tensors="pt")
    generated = model.generate(**ids, max_new_tokens=4, do_sample=False)
    assert generated.shape[1] > ids["input_ids"].shape[1]


def test_student_has_learnt_something(pipeline: FinishedRun) -> None:
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(path) for path in (pipeline.layout.finetuned, pipeline.layout.student)
    )
    pairs = zip(teacher.parameters(), student.parameters(), strict=True)
    assert any(not torch.equal(before, after) for before, after in pairs)


def test_trajectories_end_in_the_teachers_greedy_answers(pipeline: FinishedRun) -> None:
    teacher = AutoModelForCausalLM.from_pretrained(pipeline.layout.finetuned, dtype=torch.float32).eval()
    eos_ids = [teacher.generation_config.eos_token_id]
    collect = pipeline.recipe.collect
    rows = trajectories(pipeline)
    assert len(rows) == collect.num_prompts
    for row in rows[::8]:
        expected = autoregressive(teacher, DecodeRequest(row.prompt_ids, collect.max_new_tokens), eos_ids)
        assert list(row.response_ids) == expected
        fixed_points = [token for block in row.blocks for token in block.fixed_point]
        assert fixed_points[: len(expected)] == expected
        assert {len(state) for block in row.blocks for state in block.states} == {collect.block_size}


def test_trajectory_files_say_what_they_belong_to(pipeline: FinishedRun) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pipeline.layout.finetuned)
    assert len(part_files(pipeline)) == 12
    for path in part_files(pipeline):
        metadata = read_table(path)[1]
        assert metadata | {"dropped": ""} == {
            "schema_version": "1",
            "teacher": weights_revision(str(pipeline.layout.finetuned)),
            "tokenizer_hash": tokenizer_hash(tokenizer),
            "block_size": "8",
            "seed": "0",
            "dropped": "",
        }


def test_tensorboard_has_the_losses_of_both_trainings(pipeline: FinishedRun) -> None:
    for kind in ("teacher", "student"):
        assert list((pipeline.layout.scratch / "tensorboard" / kind).glob("events.out.tfevents.*"))


def test_second_run_does_nothing_and_ends_with_the_same_figures(pipeline: FinishedRun) -> None:
    files = {path: path.stat().st_mtime_ns for path in pipeline.layout.root.rglob("*") if path.is_file()}
    again = run_job("pipeline", pipeline.overrides, cwd=pipeline.layout.root.parent)
    assert again.returncode == 0, again.stderr
    lines = again.stdout.splitlines()
    outputs = [stage(pipeline.recipe) for stage in STAGES]
    assert lines[:-1] == [f"== {output.kind}: up to date in {output.path}" for output in outputs]
    first, second = summary(pipeline.done.stdout), summary(again.stdout)
    assert first | {"pipeline_seconds": 0} == second | {"pipeline_seconds": 0}
    assert files == {path: path.stat().st_mtime_ns for path in pipeline.layout.root.rglob("*") if path.is_file()}
