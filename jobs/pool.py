"""What decoding asks Ray for: actors, one a GPU or one for every few CPU cores; or a machine to itself, for timing."""

from dataclasses import dataclass

import ray
from ray.data import ActorPoolStrategy

from cllm.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Pool:
    """An actor pool for `map_batches`; `num_cpus` and `num_gpus` are those of one actor."""

    strategy: ActorPoolStrategy
    num_cpus: float | None
    num_gpus: float | None


def whole_machine(recipe: Recipe) -> dict[str, float]:
    """Options of a Ray task that measures time: a GPU, or all CPUs of a machine.

    Asking for all of a machine's CPUs makes Ray wait until the decoding pool has released them.
    """
    return exclusive(recipe.resources.gpus)


def exclusive(gpus: int) -> dict[str, float]:
    """The same for work that has `gpus` GPUs to spread over, or none."""
    return {"num_gpus": 1} if gpus else {"num_cpus": max(_machine_cpus())}


def exclusive_places(gpus: int) -> int:
    """How many such tasks can run at a time: one a GPU, or one on each machine that has the most CPUs."""
    machines = _machine_cpus()
    return gpus or machines.count(max(machines))


def _machine_cpus() -> list[float]:
    return [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]


def actor_pool(recipe: Recipe, num_batches: int) -> Pool:
    """A pool that grows to the size of the cluster, and no larger than the work.

    It begins with an actor for each of the recipe's GPUs; those beyond may belong to another job.
    """
    resources, cluster = recipe.resources, ray.cluster_resources()
    if resources.gpus:
        first = min(resources.gpus, num_batches)
        most = max(first, min(int(cluster.get("GPU", 0)), num_batches))
        return Pool(ActorPoolStrategy(min_size=first, max_size=most), None, 1)
    # a cluster that has still to grow may have no CPUs at all
    size = int(cluster.get("CPU", 0)) // resources.cpus_per_actor
    return Pool(ActorPoolStrategy(size=max(1, min(size, num_batches))), resources.cpus_per_actor, None)
