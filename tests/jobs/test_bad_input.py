"""What a user can get wrong: each is one line that names it and exit code 2, and finished outputs stay as they were.

Jobs run inside the test's process; those that need Ray share one. Two kinds of damage are told apart: a file that was
changed after it was written, which the manifest reveals, and an artifact that is whole but of something else (made by
`remade`), which only its content reveals.
"""

import argparse
import errno
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cllm.artifacts import resumable_artifact, write_artifact
from cllm.decoding.trajectories import read_table
from cllm.errors import InputError
from cllm.models import create_model, load_tokenizer, save_model
from cllm.recipe import Recipe
from cllm.recipes import get_recipe
from cllm.tasks.prompts import read_prompts
from cllm.tasks.tokenizer import train_tokenizer
from cllm.training.session import read_trajectories
from jobs import baselines, bench_distill, collect, evaluate, finetune, prepare, stages, train
from jobs.cli import EXIT_BAD_INPUT, main
from tests.jobs.running import FinishedRun, arguments, run_job

pytestmark = pytest.mark.ray

Job = Callable[[Recipe, argparse.Namespace], None]
FEW = ("collect.num_prompts=8", "collect.shard_prompts=8")  # one actor


@pytest.fixture
def run(pipeline: FinishedRun, tmp_path: Path) -> FinishedRun:
    return pipeline.copy(tmp_path / "run", "prompts", "teacher", "trajectories", "student")


def fails(
    capsys: pytest.CaptureFixture[str], job: Job, overrides: tuple[str, ...], *, recipe: str = "debug", root: Path
) -> str:
    """The message of a job that must fail and leave all finished outputs below `root` as they were."""
    before = finished_files(root)
    capsys.readouterr()
    assert main(job, None, arguments(overrides, recipe)) == EXIT_BAD_INPUT
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert finished_files(root) == before
    return errors[0]


def finished_files(root: Path) -> dict[str, int]:
    """All files with their modification times, but for what a run may leave in order to be resumed."""
    files = (path for path in root.rglob("*") if path.is_file())
    resumable = ("scratch", "trajectories.partial")
    return {str(path): path.stat().st_mtime_ns for path in files if path.relative_to(root).parts[0] not in resumable}


def remade(stage: stages.Stage, change: Callable[[Path], None]) -> None:
    """Replace a stage's output by a changed one that is whole and claims the same inputs."""
    with write_artifact(stage.path, kind=stage.kind, inputs=stage.inputs, provenance={}) as folder:
        shutil.copytree(stage.path, folder, dirs_exist_ok=True)
        (folder / "manifest.json").unlink()
        change(folder)


def with_metadata(key: str, value: str) -> Callable[[Path], None]:
    """Rewrite one trajectory file so that it says something else of where it came from."""

    def change(folder: Path) -> None:
        path = folder / "part-00003.parquet"
        table, metadata = read_table(path)
        pq.write_table(table.replace_schema_metadata(metadata | {key: value}), path)

    return change


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# The recipe


@pytest.mark.parametrize(
    ("recipe", "override", "message"),
    [
        ("nosuch", "seed=1", "error: --recipe nosuch: unknown; known are debug,"),
        (
            "debug",
            "collect.blocksize=8",
            "error: --set collect.blocksize: unknown key 'blocksize'; known here: augment",
        ),
        ("debug", "collect.block_size=many", "error: --set: collect.block_size: Input should be a valid integer"),
        ("debug", "collect.block_size=1", "error: --set: collect.block_size: Input should be greater than"),
        ("debug", "train.loss.target=locale", "error: --set: train.loss.target: Input should be 'global' or 'local'"),
    ],
)
def test_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path, recipe: str, override: str, message: str) -> None:
    overrides = (f"output={tmp_path / 'run'}", override)
    assert fails(capsys, prepare.run, overrides, recipe=recipe, root=tmp_path).startswith(message)
    assert not any(tmp_path.iterdir())


def test_gpus_that_this_machine_does_not_have(tmp_path: Path) -> None:
    """In a process of its own: the resources are checked on connecting, and the shared Ray is connected already."""
    overrides = (f"output={tmp_path / 'run'}", "resources.gpus=1")
    done = run_job("prepare", overrides, cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == EXIT_BAD_INPUT
    assert done.stderr.splitlines()[-1] == "error: resources.gpus: the recipe needs 1 GPUs, the cluster has 0"
    assert not any(tmp_path.iterdir())


# Outputs of earlier stages


@pytest.mark.parametrize(
    ("job", "override", "folder", "message"),
    [
        (finetune.run, "prompts.max_train=50", "prompts", "made with prompts.max_train=160, the recipe says 50"),
        (collect.run, "finetune.optim.steps=11", "teacher", "made with finetune.optim.steps=10, the recipe says 11"),
        (train.run, "collect.block_size=4", "trajectories", "made with collect.block_size=8, the recipe says 4"),
        (evaluate.run, "train.loss.ar_weight=2", "student", "made with train.loss.ar_weight=10.0, the recipe says 2.0"),
    ],
)
def test_output_of_another_recipe_is_not_built_on(
    capsys: pytest.CaptureFixture[str], run: FinishedRun, job: Job, override: str, folder: str, message: str
) -> None:
    makers = {"prompts": "prepare", "teacher": "finetune", "trajectories": "collect", "student": "train"}
    root = run.layout.root
    found = fails(capsys, job, (*run.overrides, override), root=root)
    assert found == f"error: {root / folder}: {message}; run jobs/{makers[folder]}.py"


def measured_distillation(recipe: Recipe, _arguments: argparse.Namespace) -> None:
    bench_distill.run(recipe, argparse.Namespace(slow_prompts=1, repeats=1, actors=1, collection_only=False))


MAKERS = {
    "prompts": stages.prepare,
    "teacher": stages.finetune,
    "trajectories": stages.collect,
    "student": stages.train,
}
READS = {
    finetune.run: ("prompts",),
    collect.run: ("prompts", "teacher"),
    train.run: ("prompts", "teacher", "trajectories"),
    baselines.run: ("prompts", "teacher", "trajectories"),
    evaluate.run: ("prompts", "teacher", "student"),
    measured_distillation: ("prompts", "teacher", "trajectories"),
}


@pytest.mark.parametrize(("job", "source"), [(job, source) for job, sources in READS.items() for source in sources])
def test_any_output_that_a_job_reads_may_have_been_made_anew_by_another_recipe(
    capsys: pytest.CaptureFixture[str], run: FinishedRun, job: Job, source: str
) -> None:
    """All others are the recipe's: made before, and left as they were."""
    output, other = MAKERS[source](run.recipe), MAKERS[source](run.recipe.with_overrides(["seed=1"]))
    with write_artifact(output.path, kind=output.kind, inputs=other.inputs, provenance={}) as folder:
        shutil.copytree(output.path, folder, dirs_exist_ok=True)
    message = fails(capsys, job, run.overrides, root=run.layout.root)
    assert message == f"error: {output.path}: made with seed=1, the recipe says 0; run jobs/{output.job}.py"


@pytest.mark.parametrize("job", [finetune.run, collect.run, train.run, evaluate.run])
def test_missing_stage(capsys: pytest.CaptureFixture[str], tmp_path: Path, job: Job) -> None:
    message = fails(capsys, job, (f"output={tmp_path / 'run'}",), root=tmp_path)
    assert "no such output folder" in message
    assert "; run jobs/" in message


def test_checkpoint_without_manifest(capsys: pytest.CaptureFixture[str], run: FinishedRun) -> None:
    (run.layout.finetuned / "manifest.json").unlink()
    message = fails(capsys, collect.run, run.overrides, root=run.layout.root)
    assert message.startswith(f"error: {run.layout.finetuned}: no manifest.json: not a finished teacher folder")


def test_truncated_trajectory_file(capsys: pytest.CaptureFixture[str], run: FinishedRun) -> None:
    path = run.layout.trajectories / "part-00003.parquet"
    cut_in_half(path)
    message = fails(capsys, train.run, run.overrides, root=run.layout.root)
    assert message.startswith(f"error: {path}: has {path.stat().st_size} bytes, manifest.json says ")


def test_student_with_another_tokenizer(capsys: pytest.CaptureFixture[str], run: FinishedRun) -> None:
    other = train_tokenizer(["count the pets", "list all students"], 300)
    remade(stages.train(run.recipe), lambda folder: other.save_pretrained(folder))
    message = fails(capsys, evaluate.run, run.overrides, root=run.layout.root)
    assert message.startswith(f"error: {run.layout.student}: its tokenizer (")
    assert f"is not the one that made {run.layout.prompts_file}" in message


def test_teacher_with_another_tokenizer_of_the_same_size(capsys: pytest.CaptureFixture[str], run: FinishedRun) -> None:
    """Found before anything is collected: its size fits, its ids are other words."""
    other = train_tokenizer(["count the pets", "list all students"], 300)
    remade(stages.finetune(run.recipe), lambda folder: other.save_pretrained(folder))
    message = fails(capsys, collect.run, run.overrides, root=run.layout.root)
    assert message.startswith(f"error: {run.layout.finetuned}: its tokenizer (")
    assert f"is not the one that made {run.layout.prompts_file}" in message


@pytest.mark.parametrize(
    ("key", "value"), [("teacher", "0" * 16), ("tokenizer_hash", "0" * 16), ("block_size", "16"), ("seed", "7")]
)
def test_trajectories_of_something_else_are_not_read(run: FinishedRun, key: str, value: str) -> None:
    remade(stages.collect(run.recipe), with_metadata(key, value))
    with pytest.raises(InputError, match=f"part-00003.parquet: {key} is {value}, the recipe's is "):
        read_trajectories(run.recipe)


def test_trajectories_of_another_teacher_stop_the_training(
    capsys: pytest.CaptureFixture[str], run: FinishedRun, local_ray: None
) -> None:
    remade(stages.collect(run.recipe), with_metadata("teacher", "0" * 16))
    message = fails(capsys, train.run, run.overrides, root=run.layout.root)
    assert message.startswith(f"error: {run.layout.trajectories / 'part-00003.parquet'}: teacher is 0000000000000000, ")
    assert not (run.layout.root / "student.tmp").exists()


# Data


def write_gsm8k(folder: Path, bad_line: str | None = None) -> str:
    """Forty training rows, of which the third is replaced; returns its origin as messages name it."""
    folder.mkdir()
    lines = [json.dumps({"question": f"What is {i} plus {i}?", "answer": f"It is #### {2 * i}"}) for i in range(50)]
    (folder / "test.jsonl").write_text("\n".join(lines[40:]))
    if bad_line is not None:
        lines[2] = bad_line
    (folder / "train.jsonl").write_text("\n".join(lines[:40]))
    return f"{folder / 'train.jsonl'}:3"


def gsm8k(root: Path, *overrides: str) -> tuple[str, ...]:
    return (f"output={root / 'run'}", f"task.source={root / 'data'}", "resources.gpus=0", *overrides)


def test_missing_data_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path, local_ray: None) -> None:
    message = fails(capsys, prepare.run, gsm8k(tmp_path), recipe="gsm8k-small", root=tmp_path)
    assert message.startswith(f"error: {tmp_path / 'data'}: expected a folder")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "What is', "not JSON: "),
        ('{"question": "What is 2 plus 2?"}', "no key 'answer'; the row has question"),
        ('{"question": "What is 2 plus 2?", "answer": 4}', "answer: expected str, got int 4"),
        ('{"question": "What is 2 plus 2?", "answer": "four"}', "answer: no final line '#### NUMBER'"),
    ],
)
def test_malformed_row(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, local_ray: None, line: str, message: str
) -> None:
    origin = write_gsm8k(tmp_path / "data", line)
    found = fails(capsys, prepare.run, gsm8k(tmp_path), recipe="gsm8k-small", root=tmp_path)
    assert found.startswith(f"error: {origin}: {message}")


LONG_ROW = json.dumps({"question": "What is " + "one plus " * 200 + "one?", "answer": "It is #### 201"})
SHORT_PROMPTS = ("prompts.max_prompt_tokens=100", "prompts.validation_fraction=0.1")


def test_too_long_prompt_is_an_error_where_the_recipe_says_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, local_ray: None
) -> None:
    origin = write_gsm8k(tmp_path / "data", LONG_ROW)
    overrides = gsm8k(tmp_path, *SHORT_PROMPTS, "prompts.too_long=error")
    message = fails(capsys, prepare.run, overrides, recipe="gsm8k-small", root=tmp_path)
    assert message.startswith(f"error: {origin}: prompt of ")
    assert "prompts.max_prompt_tokens=100" in message


def test_too_long_prompt_is_skipped_and_counted_otherwise(tmp_path: Path, local_ray: None) -> None:
    write_gsm8k(tmp_path / "data", LONG_ROW)
    assert main(prepare.run, None, arguments(gsm8k(tmp_path, *SHORT_PROMPTS), "gsm8k-small")) == 0
    counts = json.loads((tmp_path / "run" / "prompts" / "counts.json").read_text())
    assert counts["rows"] == 50
    assert counts["too_long"] == 1
    assert counts["train"] + counts["validation"] == 39


# A teacher that is loaded


def loaded_teacher(folder: Path, max_positions: int) -> tuple[str, ...]:
    """Save a model that reads so many tokens; overrides of the debug recipe that fine-tune it."""
    tokenizer = train_tokenizer(["list the names of nurses", "count pets", "how old is the oldest student"], 400)
    shape = get_recipe("debug").teacher.scratch
    assert shape is not None
    model = create_model(shape.model_copy(update={"max_positions": max_positions}), tokenizer, 0)
    save_model(folder / "teacher", model, tokenizer)
    overrides = (f"output={folder / 'run'}", "teacher.scratch=null", f"teacher.path={folder / 'teacher'}")
    fitting = ("baselines=null", "prompts.max_response_tokens=240")
    return (*overrides, *fitting, f"task.databases={folder / 'databases'}")


def test_prompts_longer_than_the_teacher_can_read_are_skipped_and_counted(tmp_path: Path, local_ray: None) -> None:
    overrides = loaded_teacher(tmp_path, max_positions=300)
    assert main(prepare.run, None, arguments(overrides)) == 0
    counts = json.loads((tmp_path / "run" / "prompts" / "counts.json").read_text())
    prompts = read_prompts(tmp_path / "run" / "prompts" / "prompts.parquet")
    assert counts["too_long"] > 0
    assert max(len(prompt.prompt_ids) for prompt in prompts) <= 300 - 240 < 256


def test_prompts_longer_than_the_teacher_can_read_are_an_error_where_the_recipe_says_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, local_ray: None
) -> None:
    overrides = (*loaded_teacher(tmp_path, max_positions=300), "prompts.too_long=error")
    message = fails(capsys, prepare.run, overrides, root=tmp_path / "run")
    assert message.startswith("error: synthetic_sql/")
    assert message.endswith("; the model's max_position_embeddings=300 leave less room for the prompt")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("collect.max_new_tokens=299", "error: collect.max_new_tokens=299: prompts in split train have up to "),
        ("evaluate.max_new_tokens=299", "error: evaluate.max_new_tokens=299: prompts in split test have up to "),
        ("prompts.max_response_tokens=300", "error: prompts.max_response_tokens=300: {teacher} reads 300 tokens "),
    ],
)
def test_responses_longer_than_the_teacher_can_read_stop_the_first_stage(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, local_ray: None, override: str, message: str
) -> None:
    overrides = (*loaded_teacher(tmp_path, max_positions=300), override)
    found = fails(capsys, prepare.run, overrides, root=tmp_path / "run")
    assert found.startswith(message.format(teacher=tmp_path / "teacher"))


def test_teacher_that_changed_its_tokenizer_is_not_fine_tuned(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, local_ray: None
) -> None:
    overrides = loaded_teacher(tmp_path, max_positions=512)
    assert main(prepare.run, None, arguments(overrides)) == 0
    train_tokenizer(["another text"], 300).save_pretrained(tmp_path / "teacher")
    message = fails(capsys, finetune.run, overrides, root=tmp_path / "run")
    assert message.startswith(f"error: {tmp_path / 'teacher'}: its tokenizer (")


# Collection


def test_teacher_with_fewer_embeddings_than_the_tokenizer_has_tokens(
    capsys: pytest.CaptureFixture[str], run: FinishedRun, local_ray: None
) -> None:
    def change(folder: Path) -> None:
        tokenizer = load_tokenizer(str(folder))
        assert run.recipe.teacher.scratch is not None
        too_small = create_model(run.recipe.teacher.scratch, tokenizer, 0, vocab_size=len(tokenizer) - 1)
        save_model(folder, too_small, tokenizer)

    remade(stages.finetune(run.recipe), change)
    message = fails(capsys, collect.run, (*run.overrides, *FEW), root=run.layout.root)
    assert message.startswith(f"error: {run.layout.finetuned}: the tokenizer does not belong to the model: ")


def test_responses_longer_than_the_model_can_read(
    capsys: pytest.CaptureFixture[str], run: FinishedRun, local_ray: None
) -> None:
    def change(folder: Path) -> None:
        tokenizer = load_tokenizer(str(folder))
        assert run.recipe.teacher.scratch is not None
        scratch = run.recipe.teacher.scratch.model_copy(update={"max_positions": 40})
        save_model(folder, create_model(scratch, tokenizer, 0), tokenizer)

    remade(stages.finetune(run.recipe), change)
    message = fails(capsys, collect.run, (*run.overrides, *FEW), root=run.layout.root)
    assert message.startswith(f"error: {run.layout.finetuned}: prompts of up to ")
    assert "max_new_tokens=32 make " in message
    assert message.endswith("the model has max_position_embeddings=40")


def test_no_response_survives_the_filters(
    capsys: pytest.CaptureFixture[str], run: FinishedRun, local_ray: None
) -> None:
    message = fails(capsys, collect.run, (*run.overrides, *FEW, "collect.max_token_repeat=0"), root=run.layout.root)
    assert message == (
        "error: no trajectory survived the filters of the collect section; dropped: {'token_repetition': 8}"
    )


def almost_collected(run: FinishedRun) -> Path:
    """The folder of a collection that was interrupted after its last part."""
    output = stages.collect(run.recipe)
    with (
        suppress(KeyboardInterrupt),
        resumable_artifact(output.path, kind=output.kind, inputs=output.inputs, provenance={}) as folder,
    ):
        for path in output.path.glob("part-*.parquet"):
            shutil.copy(path, folder)
        raise KeyboardInterrupt
    return folder


def test_truncated_part_of_an_interrupted_collection(
    capsys: pytest.CaptureFixture[str], run: FinishedRun, local_ray: None
) -> None:
    path = almost_collected(run) / "part-00003.parquet"
    cut_in_half(path)
    message = fails(capsys, collect.run, run.overrides, root=run.layout.root)
    assert message.startswith(f"error: {path}: not a readable trajectory file")


# The disk


def test_disk_full_in_the_driver(
    capsys: pytest.CaptureFixture[str], run: FinishedRun, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = almost_collected(run)

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("cllm.artifacts.os.fsync", full)
    message = fails(capsys, collect.run, run.overrides, root=run.layout.root)
    assert message.startswith(f"error: {folder}/")
    assert message.endswith(": no space left on the disk")
    assert not list(folder.glob(".*"))  # the file half written


def test_disk_full_in_an_actor(capsys: pytest.CaptureFixture[str], run: FinishedRun, local_ray: None) -> None:
    """With a real full device, which a test in one process cannot put under another's write call."""
    folder = almost_collected(run)
    (folder / "part-00003.parquet").unlink()
    (folder / "part-00003.tmp").symlink_to("/dev/full")
    message = fails(capsys, collect.run, run.overrides, root=run.layout.root)
    assert "no space left on the disk" in message
    assert not (folder / "part-00003.parquet").exists()
