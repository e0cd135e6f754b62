"""The whole pipeline: its last line, its five outputs, and that a second run has nothing to do but to show them."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from cllm.artifacts import input_difference, read_manifest
from cllm.decoding.records import DecodeRequest
from cllm.decoding.reference import autoregressive
from cllm.decoding.trajectories import Trajectory, from_table, read_table
from cllm.models import weights_revision
from cllm.report.markdown import results_text
from cllm.tasks.prompts import draw_prompts, tokenizer_hash
from jobs import stages
from jobs.evaluate import decode_live, read_results
from tests.jobs.running import ROOT, FinishedRun, arguments, run_job

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


def logged(run: FinishedRun, kind: str, tag: str) -> list[float]:
    """What a training wrote to TensorBoard, step by step."""
    events = EventAccumulator(str(run.layout.scratch / "tensorboard" / kind)).Reload()
    return [event.value for event in events.Scalars(tag)]


def test_trainings_lower_their_losses(pipeline: FinishedRun) -> None:
    """Ten steps each."""
    teacher, student = logged(pipeline, "teacher", "ar"), logged(pipeline, "student", "ar")
    assert (len(teacher), len(student)) == (3, 10)  # every fifth step and the first; every step
    assert teacher[-1] < teacher[0] - 0.1
    assert student[-1] < student[0] - 0.1
    consistency = logged(pipeline, "student", "consistency")
    assert len(consistency) == 10
    assert min(consistency) > 0


def shown_in(stdout: str) -> str:
    """What people are to see behind the last stage: all but JSON."""
    lines = stdout.splitlines()
    last_stage = max(number for number, line in enumerate(lines) if line.startswith("== "))
    return "\n".join(line for line in lines[last_stage + 1 :] if not line.startswith("{"))


def test_table_and_example_are_shown_where_output_is_no_terminal(pipeline: FinishedRun) -> None:
    results, shown = read_results(pipeline.recipe), shown_in(pipeline.done.stdout)
    assert results_text(results) in shown
    for example in results["examples"]:
        assert f"  {len(example['jacobi'])} forward passes; AR takes {len(example['ar'])}" in shown
        assert "".join(example["jacobi"]) == "".join(example["ar"])
    assert " | " in shown
    assert "\033[" not in pipeline.done.stdout


def test_second_run_makes_nothing_and_shows_and_ends_with_the_same(pipeline: FinishedRun) -> None:
    files = {path: path.stat().st_mtime_ns for path in pipeline.layout.root.rglob("*") if path.is_file()}
    again = run_job("pipeline", pipeline.overrides, cwd=pipeline.layout.root.parent)
    assert again.returncode == 0, again.stderr
    outputs = [stage(pipeline.recipe) for stage in STAGES]
    assert [line for line in again.stdout.splitlines() if line.startswith("== ")] == [
        f"== {output.kind}: up to date in {output.path}" for output in outputs
    ]
    assert shown_in(again.stdout) == shown_in(pipeline.done.stdout)
    first, second = summary(pipeline.done.stdout), summary(again.stdout)
    assert first | {"pipeline_seconds": 0} == second | {"pipeline_seconds": 0}
    assert files == {path: path.stat().st_mtime_ns for path in pipeline.layout.root.rglob("*") if path.is_file()}


def test_on_a_terminal_tokens_arrive_one_forward_pass_after_the_other(pipeline: FinishedRun) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, str(ROOT / "jobs" / "pipeline.py"), *arguments(pipeline.overrides)]
    with subprocess.Popen(command, stdout=theirs, env=os.environ | {"PYTHONPATH": str(ROOT)}) as process:
        os.close(theirs)
        arrived = []
        while piece := read_piece(ours):
            arrived.append(piece)
    os.close(ours)
    assert process.returncode == 0
    example = read_results(pipeline.recipe)["examples"][0]
    forwards = len(example["ar"]) + len(example["jacobi"])
    assert sum("\033[9" in piece for piece in arrived) > forwards / 2  # a slow reader may find two at once
    text = "".join(arrived)
    assert text.count("\033[9") == forwards
    assert text.index("ar: ") < text.index("jacobi-sliding: ") < text.index('{"task": ')
    documents = [line for line in text.splitlines() if line.startswith("{")]
    assert [json.loads(document)["task"] for document in documents] == ["synthetic_sql"]


def read_piece(terminal: int) -> str:
    try:
        return os.read(terminal, 1 << 16).decode()
    except OSError:  # how a terminal ends whose other side has been closed
        return ""


def test_the_example_is_decoded_live_by_a_task_of_its_own(pipeline: FinishedRun, local_ray: None) -> None:
    (prompt,) = draw_prompts(pipeline.layout.prompts_file, "test", 1)
    steps = list(decode_live(pipeline.recipe, prompt))
    example = read_results(pipeline.recipe)["examples"][0]
    for method, texts in (("ar", example["ar"]), ("jacobi-sliding", example["jacobi"])):
        assert len([text for name, text in steps if name == method]) == len(texts)
