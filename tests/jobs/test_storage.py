"""The pipeline copies finished stages to the storage, and on another machine goes on from them."""

import json
from pathlib import Path

import pytest

from cllm.layout import RunLayout
from jobs import pipeline as job
from jobs import stages
from jobs.cli import main
from tests.jobs.running import FinishedRun, arguments, finished_run

pytestmark = pytest.mark.ray
STAGES = ["prompts", "teacher", "trajectories", "student", "evaluation"]


def files(layout: RunLayout) -> dict[str, bytes]:
    found = (path for name in STAGES for path in (layout.root / name).rglob("*") if path.is_file())
    return {str(path.relative_to(layout.root)): path.read_bytes() for path in found}


def output_of(overrides: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    assert main(job.run, None, arguments(overrides)) == 0
    return capsys.readouterr().out.splitlines()


def test_a_run_goes_on_from_its_copies(
    pipeline: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"file://{tmp_path}/store"
    first = output_of((*pipeline.overrides, f"storage={uri}"), capsys)
    assert [line for line in first if "copied" in line] == [f"== {name}: copied to {uri}" for name in STAGES]
    elsewhere = (f"output={tmp_path / 'elsewhere'}", *pipeline.overrides[1:], f"storage={uri}")
    second = output_of(elsewhere, capsys)
    assert [line for line in second if "fetching" in line] == [
        f"== {name}: fetching {name} from {uri}" for name in STAGES
    ]
    assert not any("done in" in line or "copied" in line for line in second)
    assert files(finished_run(elsewhere, pipeline.done).layout) == files(pipeline.layout)
    same = ("teacher_accuracy", "cllm_accuracy", "tpf", "speedup_over_ar")
    # One job alone, on a third machine: it fetches all that it reads.
    third = (f"output={tmp_path / 'third'}", *elsewhere[1:])
    stages.train(finished_run(third, pipeline.done).recipe).require_sources()
    assert {path.name for path in (tmp_path / "third").iterdir()} == {"prompts", "teacher", "trajectories"}
    one, two = json.loads(first[-1]), json.loads(second[-1])
    assert [one[name] for name in same] == [two[name] for name in same]
