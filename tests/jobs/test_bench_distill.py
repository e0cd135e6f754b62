"""Actors of collection beside each other, on the pipeline's run."""

import json
from pathlib import Path

import pytest

from cllm.errors import InputError
from cllm.recipes import get_recipe
from jobs.bench_distill import measure_actors
from tests.jobs.running import FinishedRun, run_job

pytestmark = pytest.mark.ray


def test_two_actors_collect_what_one_collects(local_ray: None, pipeline: FinishedRun) -> None:
    recipe = get_recipe("debug").with_overrides(pipeline.overrides)
    found = measure_actors(recipe, 2)
    assert found["actors"] == 2
    assert found["one_tokens_per_s"] > 0
    assert found["ratio"] == pytest.approx(found["all_tokens_per_s"] / found["one_tokens_per_s"])
    with pytest.raises(InputError, match="--actors 9: they need 9 CPUs, the cluster has 2"):
        measure_actors(recipe, 9)


def test_collection_alone_needs_prompts_and_teacher(pipeline: FinishedRun, tmp_path: Path) -> None:
    run = pipeline.copy(tmp_path / "run", "prompts", "teacher")
    more = ("--collection-only", "--slow-prompts", "2", "--repeats", "3")
    done = run_job("bench_distill", run.overrides, cwd=tmp_path, more=more)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["collection"]["identical_responses"] == 1
    assert document["provenance"]["command"][1] == "--recipe"
    assert not run.layout.bench.exists()
