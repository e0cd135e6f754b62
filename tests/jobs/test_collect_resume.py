"""A collection killed halfway goes on where it stopped, and ends with exactly the rows of an uninterrupted one."""

import io
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cllm.artifacts import read_manifest
from jobs import collect
from jobs.cli import main
from tests.jobs.running import FinishedRun, arguments, killed_job

pytestmark = pytest.mark.ray


@dataclass(frozen=True, slots=True)
class Resumed:
    """A run whose collection was killed and then started again; modification times by file name."""

    run: FinishedRun
    when_killed: dict[str, int]
    stdout: str


def parts(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("part-*.parquet")}


@pytest.fixture(scope="module")
def resumed(pipeline: FinishedRun, tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Resumed:
    folder = tmp_path_factory.mktemp("collect")
    run = pipeline.copy(folder / "run", "prompts", "teacher")
    partial = run.layout.root / "trajectories.partial"
    with killed_job("collect", run.overrides, cwd=folder) as job:
        job.wait_until(lambda: bool(parts(partial)))
        job.kill()
    when_killed = parts(partial)
    missing = next(f"part-{index:05d}" for index in range(12) if f"part-{index:05d}.parquet" not in when_killed)
    (partial / f"{missing}.tmp").write_bytes(b"PAR1 half a file")  # as a kill amid the writing leaves it
    with redirect_stdout(io.StringIO()) as stdout:
        assert main(collect.run, None, arguments(run.overrides)) == 0
    return Resumed(run, when_killed, stdout.getvalue())


def test_the_kill_came_in_the_middle(resumed: Resumed) -> None:
    assert 0 < len(resumed.when_killed) < 12
    assert f"continuing: {len(resumed.when_killed)} of 12 shards are there" in resumed.stdout


def test_rows_equal_those_of_an_uninterrupted_run(resumed: Resumed, pipeline: FinishedRun) -> None:
    expected = sorted(pipeline.layout.trajectories.glob("part-*.parquet"))
    found = sorted(resumed.run.layout.trajectories.glob("part-*.parquet"))
    assert [path.name for path in found] == [path.name for path in expected]
    for left, right in zip(found, expected, strict=True):
        assert pq.read_table(left).equals(pq.read_table(right), check_metadata=True), left.name


def test_finished_parts_were_not_written_again(resumed: Resumed) -> None:
    now = parts(resumed.run.layout.trajectories)
    assert {name: now[name] for name in resumed.when_killed} == resumed.when_killed


def test_leftovers_of_the_kill_are_gone(resumed: Resumed) -> None:
    manifest = read_manifest(resumed.run.layout.trajectories, "trajectories")
    assert {Path(file.path).suffix for file in manifest.files} == {".parquet", ".json"}
    assert {path.name for path in resumed.run.layout.root.iterdir()} == {"prompts", "teacher", "trajectories"}
