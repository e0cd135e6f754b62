"""A training worker that dies is replaced, and training goes on at the exact step: same losses, same weights."""

from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file

from tests.jobs.progress import saved_step, scalars
from tests.jobs.running import FinishedRun, killed_job

pytestmark = pytest.mark.ray


@dataclass(frozen=True, slots=True)
class Survived:
    """A run whose training worker was killed once, when Ray Train knew of the checkpoint of that step."""

    run: FinishedRun
    checkpoint_step: int


@pytest.fixture(scope="module")
def survived(pipeline: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Survived:
    folder = tmp_path_factory.mktemp("train")
    run = pipeline.copy(folder / "run", "prompts", "teacher", "trajectories")
    with killed_job("train", run.overrides, cwd=folder) as job:
        job.wait_until(lambda: saved_step(run) > 0)
        (worker,) = job.find("ray::RayTrainWorker")
        step = saved_step(run)
        worker.kill()
        assert job.wait() == 0, job.log.read_text()
    return Survived(run, step)


def test_the_replacement_starts_behind_the_checkpoint(survived: Survived) -> None:
    first, second = scalars(survived.run)
    assert min(step for _, step in first) == 1
    assert max(step for _, step in first) < survived.run.recipe.train.optim.steps
    # Another checkpoint may have been registered between looking and killing.
    resumed_behind = min(step for _, step in second) - 1
    assert resumed_behind >= survived.checkpoint_step
    assert resumed_behind % survived.run.recipe.train.optim.checkpoint_every == 0
    assert max(step for _, step in second) == survived.run.recipe.train.optim.steps


def test_losses_equal_those_of_an_uninterrupted_run(survived: Survived, pipeline: FinishedRun) -> None:
    (expected,) = scalars(pipeline)
    first, second = scalars(survived.run)
    assert {step for tag, step in expected if tag == "ar"} == set(range(1, 11))
    assert first | second == expected
    assert first == {key: expected[key] for key in first}


def test_exported_weights_equal_those_of_an_uninterrupted_run(survived: Survived, pipeline: FinishedRun) -> None:
    found, expected = (load_file(run.layout.student / "model.safetensors") for run in (survived.run, pipeline))
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
