"""How a training ends: by its own mistake at once, however often workers may be replaced; by early stopping where an
uninterrupted run ends, also when a worker died on the way."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from jobs import baselines, train
from jobs.cli import EXIT_BAD_INPUT, main
from tests.jobs.progress import saved_step, scalars
from tests.jobs.running import FinishedRun, arguments, killed_job

pytestmark = pytest.mark.ray

# At such a learning rate it is best near its start.
STOPPING = (
    "train.optim.steps=200",
    "train.optim.learning_rate=0.3",
    "train.optim.checkpoint_every=3",
    "train.validate_every=2",
    "train.patience=12",
)


def changed(pipeline: FinishedRun, root: Path, *overrides: str) -> FinishedRun:
    run = pipeline.copy(root, "prompts", "teacher", "trajectories")
    return FinishedRun(run.recipe.with_overrides(overrides), (*run.overrides, *overrides), run.done)


def last_step(run: FinishedRun) -> int:
    return max(step for tag, step in scalars(run)[-1] if tag == "ar")


def student(run: FinishedRun) -> dict[str, torch.Tensor]:
    return load_file(run.layout.student / "model.safetensors")


def test_what_would_fail_again_is_not_tried_again(
    pipeline: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], local_ray: None
) -> None:
    run = changed(pipeline, tmp_path / "run", "train.optim.learning_rate=1e30", "resources.max_failures=3")
    capsys.readouterr()
    assert main(train.run, None, arguments(run.overrides)) == EXIT_BAD_INPUT
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: step ")
    assert error.endswith("; lower optim.learning_rate")
    assert len(scalars(run)) == 1  # one worker was started
    assert not run.layout.student.exists()


@pytest.fixture(scope="module")
def whole(pipeline: FinishedRun, tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> FinishedRun:
    run = changed(pipeline, tmp_path_factory.mktemp("whole") / "run", *STOPPING)
    assert main(train.run, None, arguments(run.overrides)) == 0
    return run


def weighted_losses(run: FinishedRun) -> dict[int, float]:
    """What early stopping looks at, by step."""
    logged, weight = scalars(run)[-1], run.recipe.train.loss.ar_weight
    steps = [step for tag, step in logged if tag == "validation_ar"]
    return {s: weight * logged["validation_ar", s] + logged["validation_consistency", s] for s in steps}


def test_training_ends_before_its_last_step(whole: FinishedRun) -> None:
    losses = weighted_losses(whole)
    best = min(losses, key=lambda step: losses[step])
    assert last_step(whole) == best + 12 * 2 < whole.recipe.train.optim.steps


def test_a_replaced_worker_ends_at_the_same_step_with_the_same_weights(
    whole: FinishedRun, pipeline: FinishedRun, tmp_path: Path
) -> None:
    run = changed(pipeline, tmp_path / "run", *STOPPING)
    end = last_step(whole)
    with killed_job("train", run.overrides, cwd=tmp_path) as job:
        job.wait_until(lambda: saved_step(run) > end / 2)
        (worker,) = job.find("ray::RayTrainWorker")
        worker.kill()
        assert job.wait() == 0, job.log.read_text()
    assert len(scalars(run)) == 2
    assert last_step(run) == end
    found, expected = student(run), student(whole)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_rows_that_the_workers_of_a_baseline_cannot_share(
    pipeline: FinishedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before anything starts; the recipe lets it pass, for the pipeline does not train baselines."""
    overrides = (*pipeline.overrides, "baselines.medusa.optim.accumulation=3")
    capsys.readouterr()
    assert main(baselines.run, None, arguments(overrides)) == EXIT_BAD_INPUT
    assert capsys.readouterr().err == (
        "error: baselines.medusa.optim.rows_per_step=4 is no multiple of baselines.medusa.optim.accumulation=3 x 1 "
        "workers\n"
    )
