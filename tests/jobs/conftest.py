"""One pipeline run and one local Ray for all tests of the jobs: each takes longer than the tests themselves."""

from collections.abc import Iterator

import pytest

from tests.jobs.running import FinishedRun, finished_run, run_job

SETTINGS = (
    "collect.shard_prompts=4",  # twelve shards, so that a kill finds some done and some not
    "train.optim.checkpoint_every=2",
    "train.optim.log_every=1",
)


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """The debug recipe from prompts to report in one go; tests work on copies."""
    folder = tmp_path_factory.mktemp("pipeline")
    overrides = (f"output={folder / 'run'}", *SETTINGS)
    # Ray Train takes a checkpoint from a worker only when it next looks after it, every 2 s by default.
    done = run_job("pipeline", overrides, cwd=folder, RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2")
    assert done.returncode == 0, done.stderr[-4000:]
    return finished_run(overrides, done)


@pytest.fixture(scope="package")
def local_ray() -> Iterator[None]:
    """Ray for jobs that run inside the test's process; `jobs.cluster.connect` uses what is there."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False
        )
        yield
        ray.shutdown()
