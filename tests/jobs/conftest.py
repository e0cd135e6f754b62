"""One pipeline run and one local Ray for all tests of the jobs: each takes longer than the tests themselves."""

import gc
import time
from collections.abc import Iterator

import pytest
import ray

from tests.jobs.running import FinishedRun, finished_run, run_job

IDLE_S = 6
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        start_ray()
        yield
        ray.shutdown()


@pytest.fixture(autouse=True)
def ray_is_idle_afterwards(request: pytest.FixtureRequest) -> Iterator[None]:
    """The next test may need all CPUs. Actors of a collection that failed live as long as anything refers to them, such
    as the frames of its error; if that is for long, the next test gets another Ray."""
    yield
    if "local_ray" in request.fixturenames and not becomes_idle():
        ray.shutdown()
        start_ray()


def start_ray() -> None:
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)


def becomes_idle() -> bool:
    """Whether all CPUs are free within some seconds."""
    deadline = time.monotonic() + IDLE_S
    while ray.available_resources().get("CPU", 0) < ray.cluster_resources()["CPU"]:
        if time.monotonic() > deadline:
            return False
        gc.collect()
        time.sleep(0.1)
    return True
