"""What KubeRay's operator checks of a manifest beyond its fields: the rules of its `validation.go`, version 1.6.2.

As far as a file alone can break them. Every function yields one line a mistake.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from tests.cluster.pod_rules import pod_mistakes

Data = Mapping[str, Any]
INT32_MAX = 2**31 - 1
# The operator makes names from these: 63 characters of a service less "-serve-svc"; a cluster's takes 6 more.
NAME_LIMITS = {"RayCluster": 53, "RayJob": 47, "RayService": 47}
_DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LABEL_KEY = re.compile(r"([a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-._A-Za-z0-9]{0,61}[A-Za-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-._A-Za-z0-9]{0,61}[A-Za-z0-9])?)?")
_VERSION = re.compile(r"\s*v?((?:0|[1-9][0-9]*)(?:\.[0-9]+)+)")


def rule_mistakes(manifest: Data) -> Iterator[str]:
    """Of a manifest that fits the schema."""
    kind, name, spec = manifest["kind"], manifest["metadata"]["name"], manifest["spec"]
    annotations = manifest["metadata"].get("annotations") or {}
    if len(name) > NAME_LIMITS[kind]:
        yield f"metadata.name: a {kind}'s has at most {NAME_LIMITS[kind]} characters, this has {len(name)}"
    if not _DNS_LABEL.fullmatch(name):
        yield f"metadata.name: {name} is no DNS label"
    if kind == "RayCluster":
        yield from _cluster(spec, annotations)
    elif kind == "RayJob":
        yield from _job(spec)
        if "rayClusterSpec" in spec:
            yield from _owned_cluster(spec["rayClusterSpec"], annotations)
    else:
        yield from _service(spec)
        yield from _owned_cluster(spec["rayClusterConfig"], annotations)


def _cluster(spec: Data, annotations: Mapping[str, str]) -> Iterator[str]:
    groups = [(group["groupName"], group) for group in spec.get("workerGroupSpecs", [])]
    for name, group in [("head", spec["headGroupSpec"]), *groups]:
        yield from (f"{name}: {mistake}" for mistake in _group(group))
        yield from (f"{name}: {mistake}" for mistake in pod_mistakes(group["template"].get("spec", {})))
    yield from _fault_tolerance(spec, annotations)
    yield from _autoscaling(spec)
    yield from _authentication(spec)


def _group(group: Data) -> Iterator[str]:
    parameters, resources = group.get("rayStartParams", {}), group.get("resources", {})
    if resources and {"num-cpus", "num-gpus", "memory", "resources"} & parameters.keys():
        yield "resources: given in rayStartParams as well"
    if "labels" in parameters:
        yield "rayStartParams.labels: not supported; use labels"
    for key, value in group.get("labels", {}).items():
        if not (_LABEL_KEY.fullmatch(key) and _LABEL_VALUE.fullmatch(value)):
            yield f"labels: {key}={value} is no label"
    least, most = group.get("minReplicas", 0), group.get("maxReplicas", INT32_MAX)  # the CRD's defaults
    if not 0 <= least <= most:
        yield f"minReplicas: {least} is not from 0 to maxReplicas, {most}"


def _fault_tolerance(spec: Data, annotations: Mapping[str, str]) -> Iterator[str]:
    environment, parameters = _head_environment(spec), spec["headGroupSpec"].get("rayStartParams", {})
    chosen = "gcsFaultToleranceOptions" in spec
    if chosen:
        twice = {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD"} & environment.keys()
        twice |= {"redis-password"} & parameters.keys()
        twice |= {"ray.io/ft-enabled", "ray.io/external-storage-namespace"} & annotations.keys()
        yield from (f"{name}: gcsFaultToleranceOptions says it" for name in sorted(twice))
    elif "RAY_REDIS_ADDRESS" in environment and annotations.get("ray.io/ft-enabled") != "true":
        yield "RAY_REDIS_ADDRESS: needs gcsFaultToleranceOptions"
    if "redis-username" in parameters or "REDIS_USERNAME" in environment:
        yield "redis-username: use gcsFaultToleranceOptions.redisUsername"


def _autoscaling(spec: Data) -> Iterator[str]:
    enabled, options = spec.get("enableInTreeAutoscaling", False), spec.get("autoscalerOptions", {})
    variable = _head_environment(spec).get("RAY_enable_autoscaler_v2")
    second = enabled and options.get("version") == "v2"
    groups = spec.get("workerGroupSpecs", [])
    if options.get("idleTimeoutSeconds", 0) < 0:
        yield "autoscalerOptions.idleTimeoutSeconds: negative"
    if not enabled and variable in ("1", "true"):
        yield "RAY_enable_autoscaler_v2: needs enableInTreeAutoscaling"
    if enabled and variable is not None and "version" in options:
        yield "RAY_enable_autoscaler_v2: autoscalerOptions.version says it"
    for group in groups:
        seconds = group.get("idleTimeoutSeconds", 0)
        if seconds < 0:
            yield f"{group['groupName']}: idleTimeoutSeconds: negative"
        elif "idleTimeoutSeconds" in group and options.get("version") != "v2" and variable not in ("1", "true"):
            yield f"{group['groupName']}: idleTimeoutSeconds: needs autoscalerOptions.version v2"
        if enabled and group.get("suspend"):
            yield f"{group['groupName']}: suspend: not with autoscaling"
    restarts = [group["template"].get("spec", {}).get("restartPolicy") for group in [spec["headGroupSpec"], *groups]]
    if second and set(restarts) - {None, "", "Never"}:
        yield "restartPolicy: Never or nothing with the autoscaler's version v2"


def _authentication(spec: Data) -> Iterator[str]:
    options = spec.get("authOptions", {})
    delegated = bool(options.get("enableK8sTokenAuth"))
    if options.get("mode") != "token":
        if delegated:
            yield "authOptions.enableK8sTokenAuth: needs mode token"
        return
    wanted = (2, 55, 0) if delegated else (2, 52, 0)
    found = _VERSION.match(spec.get("rayVersion", ""))
    if found is None:
        yield "authOptions.mode: token needs a rayVersion"
        return
    version = [int(number) for number in found[1].split(".")]
    if tuple(version + [0] * (3 - len(version))) < wanted:
        yield f"authOptions: needs rayVersion {'.'.join(map(str, wanted))}, this is {found[1]}"


def _job(spec: Data) -> Iterator[str]:
    selector, cluster = spec.get("clusterSelector", {}), spec.get("rayClusterSpec")
    mode, retries = spec.get("submissionMode", "K8sJobMode"), spec.get("backoffLimit", 0)
    if not selector and cluster is None:
        yield "spec: needs clusterSelector or rayClusterSpec"
    if selector and not selector.get("ray.io/cluster"):
        yield "clusterSelector: ray.io/cluster is empty"
    if selector and mode == "SidecarMode":
        yield "submissionMode: SidecarMode not with clusterSelector"
    if retries < 0 or (retries and (selector or mode == "InteractiveMode")):
        yield f"backoffLimit: {retries} is negative, or not 0 with clusterSelector or InteractiveMode"
    if mode == "SidecarMode":
        yield from (f"{key}: not in SidecarMode" for key in ("submitterPodTemplate", "submitterConfig") if key in spec)
        pod = (cluster or {}).get("headGroupSpec", {}).get("template", {}).get("spec", {})
        if pod.get("restartPolicy") not in (None, "", "Never"):
            yield "headGroupSpec: restartPolicy: Never or nothing in SidecarMode"
    if mode != "InteractiveMode" and not spec.get("entrypoint"):  # of Ray's job server, not of the operator
        yield "entrypoint: missing"
    if spec.get("activeDeadlineSeconds", 1) <= 0:
        yield "activeDeadlineSeconds: not positive"
    if not _is_mapping(spec.get("runtimeEnvYAML", "")):
        yield "runtimeEnvYAML: not YAML"
    yield from _job_end(spec, selector, cluster)


def _job_end(spec: Data, selector: Data, cluster: Data | None) -> Iterator[str]:
    """Suspending and what is deleted in the end."""
    shutdown, ttl = spec.get("shutdownAfterJobFinishes", False), spec.get("ttlSecondsAfterFinished", 0)
    if spec.get("suspend") and (selector or not shutdown):
        yield "suspend: needs shutdownAfterJobFinishes, and no clusterSelector"
    if ttl < 0 or (ttl and not shutdown):
        yield "ttlSecondsAfterFinished: is negative, or needs shutdownAfterJobFinishes"
    strategy = spec.get("deletionStrategy")
    if strategy is None:
        return
    rules = strategy.get("deletionRules", [])
    policies = {rule["policy"] for rule in rules}
    policies |= {strategy[key].get("policy") for key in ("onSuccess", "onFailure") if key in strategy}
    if rules and shutdown:
        yield "deletionStrategy.deletionRules: not with shutdownAfterJobFinishes"
    if None in policies:
        yield "deletionStrategy: onSuccess and onFailure need a policy"
    if shutdown and "DeleteNone" in policies:
        yield "deletionStrategy: DeleteNone not with shutdownAfterJobFinishes"
    if selector and policies & {"DeleteCluster", "DeleteWorkers"}:
        yield "deletionStrategy: not on the cluster of a clusterSelector"
    if (cluster or {}).get("enableInTreeAutoscaling") and "DeleteWorkers" in policies:
        yield "deletionStrategy: DeleteWorkers not with autoscaling"
    yield from _deletion_order(rules)


def _deletion_order(rules: list[Data]) -> Iterator[str]:
    """Of one condition: each policy once, workers no later than the cluster, the cluster no later than the job."""
    seconds: dict[tuple[str, str], int] = {}
    for rule in rules:
        condition = rule["condition"]
        status = condition.get("jobStatus") or condition["jobDeploymentStatus"]
        if (status, rule["policy"]) in seconds:
            yield f"deletionRules: {rule['policy']} twice on {status}"
        seconds[status, rule["policy"]] = condition.get("ttlSeconds", 0)
    for status in {status for status, _ in seconds}:
        order = [seconds.get((status, policy)) for policy in ("DeleteWorkers", "DeleteCluster", "DeleteSelf")]
        given = [value for value in order if value is not None]
        if given != sorted(given):
            yield f"deletionRules: on {status}, ttlSeconds fall from workers to cluster to job"


def _service(spec: Data) -> Iterator[str]:
    cluster, strategy = spec["rayClusterConfig"], spec.get("upgradeStrategy", {})
    if (cluster["headGroupSpec"].get("headService") or {}).get("metadata", {}).get("name"):
        yield "headService: its name belongs to KubeRay"
    if strategy.get("type") != "NewClusterWithIncrementalUpgrade":
        return
    options = strategy.get("clusterUpgradeOptions")
    if not cluster.get("enableInTreeAutoscaling"):
        yield "upgradeStrategy: NewClusterWithIncrementalUpgrade needs autoscaling"
    if options is None:
        yield "upgradeStrategy: needs clusterUpgradeOptions"
        return
    percents = options.get("maxSurgePercent", 100), options["stepSizePercent"]
    if not all(0 <= percent <= 100 for percent in percents) or options["intervalSeconds"] <= 0:
        yield "clusterUpgradeOptions: percents are from 0 to 100, seconds positive"
    if not options["gatewayClassName"]:
        yield "clusterUpgradeOptions: gatewayClassName is empty"


def _owned_cluster(spec: Data, annotations: Mapping[str, str]) -> Iterator[str]:
    """The cluster that the operator makes for a job or a service."""
    yield from _cluster(spec, annotations)
    if "type" in spec.get("upgradeStrategy", {}):
        yield "upgradeStrategy: not of a cluster that KubeRay makes"


def _head_environment(spec: Data) -> dict[str, str | None]:
    containers = spec["headGroupSpec"]["template"].get("spec", {}).get("containers", [])
    return {entry["name"]: entry.get("value") for entry in (containers[0].get("env", []) if containers else [])}


def _is_mapping(text: str) -> bool:
    try:
        return isinstance(yaml.safe_load(text), dict | None)
    except yaml.YAMLError:
        return False
