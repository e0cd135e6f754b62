"""What cells take of a cluster, what is left behind by their workers, and what is said meanwhile."""

import os
import subprocess
import sys
from typing import Any

import pytest

from cllm.bench.matrices import get_matrix
from cllm.bench.matrix import MatrixRecipe
from cllm.bench.methods import VllmMethod
from jobs.benchmark import Progress
from jobs.lanes import MARK, cost, kill_marked, resources
from tests.bench.records import AR, make_cell, make_record


def matrix(**changed: Any) -> MatrixRecipe:
    return MatrixRecipe.from_data(get_matrix("debug").model_dump() | changed, where="test")


def test_timed_cells_have_whole_gpus() -> None:
    several = matrix(gpus=4)
    pair = make_cell(VllmMethod(gpus=2))
    assert (resources(make_cell(AR), several), cost(make_cell(AR), several)) == ({"num_gpus": 1}, 1)
    assert (resources(pair, several), cost(pair, several)) == ({"num_gpus": 2}, 2)


def test_cells_that_are_not_timed_share() -> None:
    load = {"num_prompts": 4, "repeats": 0}
    assert resources(make_cell(AR), matrix(gpus=1, gpu_share=0.25, load=load)) == {"num_gpus": 0.25}
    assert resources(make_cell(AR), matrix(threads=1, load=load)) == {"num_cpus": 1}


@pytest.mark.ray
def test_timed_cells_have_a_machines_cpus_to_themselves(local_ray: None) -> None:
    assert resources(make_cell(AR), matrix(threads=1)) == {"num_cpus": 2}


def test_what_a_worker_left_behind_is_ended() -> None:
    """Children of children too, and no one else's."""
    sleeper = "import time; print(1, flush=True); time.sleep(300)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleeper!r}])"
    started = [
        subprocess.Popen([sys.executable, "-c", parent], env={**os.environ, MARK: mark}, stdout=subprocess.PIPE)
        for mark in ("mine", "theirs")
    ]
    mine, theirs = started
    try:
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()  # the grandchild is up
        assert kill_marked("mine") == 2
        assert mine.wait(timeout=30) != 0
        assert theirs.poll() is None
    finally:
        kill_marked("theirs")
        for process in started:
            process.wait(timeout=30)
            assert process.stdout is not None
            process.stdout.close()


def test_progress_tells_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(total=5, places=2)
    for seconds in (30.0, 90.0):
        progress.show(make_record().model_copy(update={"seconds": seconds}))
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("[1/5] demo teacher ar c=1: 100 tokens/s, 1.00 tokens/forward, 50.0%")
    assert "about 1.0 min left" in first  # four cells of 30 s, two at a time
    assert "about 1.5 min left" in second  # three of 60 s
