"""The Serve application: `import_path: serving.build:app`, its arguments an `AppConfig`."""

import sys
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig, RequestRouterConfig
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.handle import DeploymentHandle

from serving.app import create_app
from serving.backend import ServeBackend
from serving.config import AnyModel, AppConfig, Autoscaling, VllmModel
from serving.engines import check_model
from serving.keys import KeyRing
from serving.metrics_page import read_cluster_metrics
from serving.replica import Replica
from serving.retry import RetryingBackend
from serving.service import Service

# A replica's engine launches a step every few milliseconds, and must not wait longer than that for the streams' thread
# to give up the interpreter; CPython would let it wait for 5 ms.
_SWITCH_S = 0.0005


@serve.ingress()
class Ingress:
    """Speaks HTTP in front of the models' deployments."""

    def __init__(self, config: AppConfig, handles: dict[str, DeploymentHandle[Replica]]) -> None:
        self._config = config
        self._handles = handles

    def __serve_build_asgi_app__(self) -> FastAPI:
        config = self._config
        backends = {
            name: RetryingBackend(
                ServeBackend(handle, by_prefix=config.models[name].routing == "prefix"),
                config.ingress.attempts,
                config.ingress.resume_s,
            )
            for name, handle in self._handles.items()
        }
        service = Service(backends, config.limits, config.ingress.retry_after_s)
        keys = None if config.keys is None else KeyRing.load(config.keys)
        return create_app(service, config.limits, keys, read_cluster_metrics)


class ServedReplica(Replica):
    """A replica that ends its engine when Serve, which calls `__del__` for this, ends it."""

    def __init__(self, name: str, model: AnyModel) -> None:
        self._has_started = False
        sys.setswitchinterval(_SWITCH_S)
        super().__init__(name, model)
        self._has_started = True

    def __del__(self) -> None:
        if self._has_started:
            self.close()


def app(args: dict[str, Any]) -> serve.Application:
    """The application of an `AppConfig` as plain data.

    Raises:
        InputError: an unknown key or engine, settings that contradict each other, or more GPUs than the cluster has.
    """
    config = AppConfig.from_data(args, where="args")
    for name, model in config.models.items():
        check_model(name, model)
    if ray.is_initialized():
        nodes = [node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"]]
        config.check_fits(ray.cluster_resources(), largest_node=max(nodes, default=0))
    return application(config)


def application(config: AppConfig, replica: type[Replica] = ServedReplica) -> serve.Application:
    """An ingress and a deployment of `replica` for each model, unchecked."""
    handles = {name: _model(name, model, replica) for name, model in config.models.items()}
    ingress = _deployment(
        Ingress,
        name="ingress",
        num_replicas=config.ingress.replicas,
        max_ongoing_requests=config.ingress.connections,
        max_queued_requests=config.ingress.connections,  # more are refused by Serve's proxy, in its own words
        backpressure_config=BackpressureConfig(retry_after_s=config.ingress.retry_after_s),
        graceful_shutdown_timeout_s=max(model.drain_s for model in config.models.values()),
        ray_actor_options={"num_cpus": config.ingress.cpus},
    )
    return ingress.bind(config, handles)


def _model(name: str, model: AnyModel, replica: type[Replica]) -> serve.Application:
    options: dict[str, Any] = {}
    if isinstance(model.replicas, Autoscaling):
        options["autoscaling_config"] = AutoscalingConfig(
            min_replicas=model.replicas.min_replicas,
            max_replicas=model.replicas.max_replicas,
            target_ongoing_requests=model.replicas.target_ongoing,
            upscale_delay_s=model.replicas.upscale_delay_s,
            downscale_delay_s=model.replicas.downscale_delay_s,
        )
    else:
        options["num_replicas"] = model.replicas
    if model.routing == "prefix":
        options["request_router_config"] = _by_prefix(model.most_replicas)
    deployment = _deployment(
        replica,
        name=name,
        max_ongoing_requests=model.ongoing,
        max_queued_requests=model.max_queue,
        graceful_shutdown_timeout_s=model.drain_s,
        max_constructor_retry_count=3,  # a model that cannot be loaded will not be loadable the twentieth time
        ray_actor_options=_resources(model),
        **options,
    )
    return deployment.bind(name, model)


def _by_prefix(most_replicas: int) -> RequestRouterConfig:
    """A prefix has all replicas in an order of its own, and goes to the first one that has room.

    Serve would stop at the third; then a prefix that everybody shares could use no more than three replicas.
    """
    return RequestRouterConfig(
        request_router_class=ConsistentHashRouter,  # type: ignore[arg-type]  # a dict, says the annotation of its field
        request_router_kwargs={"num_fallback_replicas": most_replicas - 1},
    )


def _resources(model: AnyModel) -> dict[str, Any]:
    """Of one replica, which is one actor: its GPUs are all on its node."""
    resources: dict[str, Any] = {"num_cpus": model.cpus, "num_gpus": model.gpus}
    if isinstance(model, VllmModel):
        # vLLM's scheduler in a process of its own would survive a replica that is killed, and keep its GPU.
        resources["runtime_env"] = {"env_vars": {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}}
    return resources


def _deployment(target: type[Any], **options: Any) -> serve.Deployment:
    decorate: Any = serve.deployment  # its annotation knows the decorator only
    return decorate(target).options(**options)
