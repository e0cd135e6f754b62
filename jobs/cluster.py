"""Connecting to Ray, and checking that it has what the recipe asks for."""

import logging
import os
import sys
import time
from pathlib import Path

import ray
from ray.data import DataContext
from ray.util.placement_group import placement_group, remove_placement_group

from cllm.errors import InputError
from cllm.recipe import Recipe

_POLL_S = 1.0
LOCAL_OBJECT_STORE_BYTES = 256 << 20  # rows pass through it, never weights; Ray's default is 30% of the memory


def connect(recipe: Recipe) -> None:
    """`start`, and check that the cluster has what the recipe needs.

    A cluster may start its GPU nodes only when they are asked for: they are, and `resources.wait_s` is how long they
    may take. Connecting twice is harmless, so `jobs.pipeline` and the stages that it calls each do so.

    Raises:
        InputError: RAY_ADDRESS is not that of a running cluster, or there is less than the recipe needs: on this
            machine, or on a cluster that does not grow.
    """
    if ray.is_initialized():
        return
    start()
    if not os.environ.get("RAY_ADDRESS"):
        check_resources(recipe, ray.cluster_resources())
        return
    _warn_of_temporary_output(recipe)
    try:
        check_resources(recipe, ray.cluster_resources())
    except InputError as shortage:
        patience = f"waiting up to {recipe.resources.wait_s:g} s for it to grow (resources.wait_s)"
        print(f"warning: {shortage}; {patience}", file=sys.stderr, flush=True)
        _wait_until_grown(recipe)


def start() -> None:
    """Connect to the cluster of this Ray job or of RAY_ADDRESS, or else start Ray on this machine; once is enough.

    Raises:
        InputError: RAY_ADDRESS is not that of a running cluster.
    """
    if ray.is_initialized():
        return
    # Ray Data's own progress report is a page a second on a plain terminal; the jobs print a line instead.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data.exceptions").setLevel(logging.CRITICAL)  # it logs what it raises, traceback and all
    context = DataContext.get_current()
    context.enable_progress_bars = False
    # An actor holds a model, and the warning that it takes more memory than was asked for helps nobody.
    context.issue_detectors_config.high_memory_detector_config.detection_time_interval_s = -1
    address = os.environ.get("RAY_ADDRESS")  # `ray job submit` sets it for the job's driver
    if address:
        _connect_to(address)
    else:
        _start_local()


def check_resources(recipe: Recipe, available: dict[str, float]) -> None:
    """Refuse at once what Ray would wait for without end.

    Raises:
        InputError: fewer GPUs or CPUs in the cluster than the recipe needs.
    """
    wanted = recipe.resources
    if wanted.gpus > available.get("GPU", 0):
        raise InputError(
            f"resources.gpus: the recipe needs {wanted.gpus} GPUs, the cluster has {available.get('GPU', 0):g}"
        )
    cpus = max(wanted.workers * wanted.cpus_per_worker, wanted.cpus_per_actor)
    if wanted.gpus == 0 and cpus > available.get("CPU", 0):
        raise InputError(f"resources: the recipe needs {cpus} CPUs, the cluster has {available.get('CPU', 0):g}")


def _wait_until_grown(recipe: Recipe) -> None:
    """Ask the cluster's autoscaler for the recipe's resources, and wait for them.

    The asking is done by a placement group that nothing runs in: it ends with this job, however the job ends.

    Raises:
        InputError: they did not come in time.
    """
    wanted = recipe.resources
    cpus = max(wanted.cpus_per_worker, wanted.cpus_per_actor)
    demand = placement_group([{"GPU": 1.0}] * wanted.gpus or [{"CPU": float(cpus)}] * wanted.workers)
    deadline = time.monotonic() + wanted.wait_s
    try:
        while True:
            try:
                return check_resources(recipe, ray.cluster_resources())
            except InputError as shortage:
                if time.monotonic() >= deadline:
                    message = f"{shortage}, and has not grown within {wanted.wait_s:g} s (resources.wait_s)"
                    raise InputError(message) from shortage
            time.sleep(_POLL_S)
    finally:
        remove_placement_group(demand)


def _warn_of_temporary_output(recipe: Recipe) -> None:
    """A submitted job runs in a copy of the working folder on one node, which Ray deletes in time."""
    if not Path(recipe.output).is_absolute():
        print(
            f"warning: output {recipe.output} is relative, so it stays in the job's temporary folder on one node; "
            "give a folder on shared storage: --set output=/shared/...",
            file=sys.stderr,
        )


def _connect_to(address: str) -> None:
    if address.startswith(("http://", "https://")):
        raise InputError(f"RAY_ADDRESS={address} is a job server: start the job with `ray job submit`, or unset it")
    try:
        ray.init(address=address, logging_level=logging.WARNING)
    except ConnectionError as error:
        raise InputError(f"RAY_ADDRESS={address}: cannot connect to a Ray cluster ({error})") from error


def _start_local() -> None:
    # Ray's processes inherit these. OpenMP threads that wait go to sleep sooner than by default (300,000 rounds): where
    # another process takes a core, long spinning makes a training step five times slower; 20,000 costs nothing else.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    ray.init(
        address="local",
        object_store_memory=LOCAL_OBJECT_STORE_BYTES,
        include_dashboard=False,
        # In the workers too: without the dashboard's state API, Ray Train's cleaner warns every few seconds.
        logging_config=ray.LoggingConfig(log_level="ERROR"),
    )
