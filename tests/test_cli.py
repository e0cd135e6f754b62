"""What a job's command line prints, and the exit codes it gives."""

import argparse
import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cllm.errors import InputError
from cllm.recipe import Recipe
from cllm.recipes import get_recipe
from jobs.cli import EXIT_BAD_INPUT, main, print_last_line_json, stage
from jobs.cluster import check_resources
from jobs.errors import input_error_in

ROOT = Path(__file__).resolve().parents[1]
DEBUG = ["--recipe", "debug"]


def failing(error: Exception) -> Any:
    def job(_recipe: Recipe, _arguments: argparse.Namespace) -> None:
        raise error

    return job


def test_job_receives_the_overridden_recipe_and_its_own_options() -> None:
    seen: list[tuple[int, bool]] = []
    code = main(
        lambda recipe, arguments: seen.append((recipe.seed, arguments.fresh)),
        "Do it.",
        [*DEBUG, "--set", "seed=5", "--fresh"],
        add_arguments=lambda parser: parser.add_argument("--fresh", action="store_true"),
    )
    assert (code, seen) == (0, [(5, True)])


def test_show_prints_the_resolved_recipe_and_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(failing(AssertionError("ran")), "Do it.", [*DEBUG, "--set", "seed=5", "--show"]) == 0
    shown = Recipe.from_data(json.loads(capsys.readouterr().out), where="--show")
    assert shown == get_recipe("debug").model_copy(update={"seed": 5})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "nosuch"], "error: --recipe nosuch: unknown; known are debug,"),
        ([*DEBUG, "--set", "train.optim.stepz=1"], "error: --set train.optim.stepz: unknown key 'stepz'"),
    ],
)
def test_bad_recipe_is_one_line_and_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(failing(AssertionError("ran")), "Do it.", arguments) == EXIT_BAD_INPUT
    stderr = capsys.readouterr().err
    assert stderr.startswith(message)
    assert stderr.count("\n") == 1


def test_a_message_of_several_lines_becomes_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(failing(InputError("row 3:\n  bad")), "Do it.", DEBUG) == EXIT_BAD_INPUT
    assert capsys.readouterr().err == "error: row 3: bad\n"


def test_defect_keeps_its_traceback() -> None:
    with pytest.raises(KeyError, match="ours"):
        main(failing(KeyError("ours")), "Do it.", DEBUG)


def test_an_input_error_that_was_handled_does_not_excuse_a_defect() -> None:
    defect = RuntimeError("defect")
    defect.__cause__ = InputError("handled")
    assert input_error_in(defect) is None


def test_full_disk_is_bad_input() -> None:
    assert input_error_in(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/x")) == (
        "no space left on the disk: /data/x"
    )
    assert input_error_in(OSError(errno.EACCES, "Permission denied", "/data/x")) is None


@pytest.mark.ray
def test_input_error_is_found_where_ray_wraps_it() -> None:
    from ray.exceptions import RayTaskError
    from ray.train import ControllerError, WorkerGroupError

    wrapped = RayTaskError("f", "Traceback ...\ncllm.errors.InputError: row 3", InputError("row 3"), pid=1, ip="::")
    for error in (
        wrapped.as_instanceof_cause(),
        pickle.loads(pickle.dumps(WorkerGroupError("text", {0: RuntimeError("peer lost"), 1: InputError("row 3")}))),
        ControllerError(wrapped.as_instanceof_cause()),
    ):
        assert input_error_in(error) == "row 3"
    assert input_error_in(WorkerGroupError("text", {0: RuntimeError("defect")})) is None


@pytest.mark.ray
def test_input_error_is_found_in_real_ray_tasks_and_data_functions(tmp_path: Path) -> None:
    """Ray Data and actor constructors pass on only the text of the traceback, in a format of Ray's choosing."""
    script = tmp_path / "job.py"
    script.write_text(
        """
import ray, ray.data
from cllm.errors import InputError
from jobs.errors import input_error_in

ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)

def bad_rows(batch):
    raise InputError("row 3")

@ray.remote
class Broken:
    def __init__(self):
        raise InputError("row 4")

    def touch(self):
        pass

for attempt in (
    lambda: ray.data.range(4).map_batches(bad_rows).materialize(),
    lambda: ray.get(Broken.remote().touch.remote()),
):
    try:
        attempt()
    except Exception as error:
        print("found:", input_error_in(error))
"""
    )
    done = run_python(str(script), cwd=ROOT, env={"PYTHONPATH": str(ROOT)})
    assert [line for line in done.stdout.splitlines() if line.startswith("found:")] == ["found: row 3", "found: row 4"]


@pytest.mark.parametrize(
    ("body", "code", "last_line"),
    [
        ("pass", 0, None),
        ("raise InputError('rows.json:3: no key')", 2, "error: rows.json:3: no key"),
        ("raise KeyError('ours')", 1, "KeyError: 'ours'"),
    ],
)
def test_exit_codes_of_a_process(tmp_path: Path, body: str, code: int, last_line: str | None) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        "import sys\nfrom cllm.errors import InputError\nfrom jobs.cli import main\n"
        f"def job(recipe, arguments):\n    {body}\n"
        "sys.exit(main(job, 'Do it.'))\n"
    )
    done = run_python(str(script), *DEBUG, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == code
    assert (done.stderr.splitlines() or [None])[-1] == last_line


def test_last_line_is_one_json_document(capsys: pytest.CaptureFixture[str]) -> None:
    with stage("train"):
        print("for people")
    print_last_line_json({"loss": 0.5, "steps": [1, 2]})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "== train"
    assert json.loads(lines[-1]) == {"loss": 0.5, "steps": [1, 2]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        print_last_line_json({"loss": float("nan")})


def test_missing_resources_are_named_at_once() -> None:
    recipe = get_recipe("debug").with_overrides(["resources.gpus=4"])
    with pytest.raises(InputError, match="needs 4 GPUs, the cluster has 2"):
        check_resources(recipe, {"CPU": 64.0, "GPU": 2.0})
    with pytest.raises(InputError, match="needs 4 GPUs, the cluster has 0"):
        check_resources(recipe, {"CPU": 64.0})
    check_resources(recipe, {"CPU": 1.0, "GPU": 4.0})
    with pytest.raises(InputError, match="needs 8 CPUs, the cluster has 2"):
        check_resources(get_recipe("debug").with_overrides(["resources.cpus_per_worker=8"]), {"CPU": 2.0})
    workers = get_recipe("debug").with_overrides(["resources.workers=2", "resources.cpus_per_worker=2"])
    with pytest.raises(InputError, match="needs 4 CPUs, the cluster has 2"):
        check_resources(workers, {"CPU": 2.0})


def run_python(*arguments: str, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    quiet = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=os.environ | quiet | env, capture_output=True, text=True, timeout=120
    )
