"""Changes of our manifests: some that KubeRay or Kubernetes refuses, with part of the complaint, and some it takes."""

import copy
import json
from typing import Any

from tests.cluster.files import CLUSTER, load

Changes = dict[str, Any]
GONE = object()  # as a value: the key is not there
POD = "workerGroupSpecs/0/template/spec"
BOX = f"{POD}/containers/0"
HEAD_ENV = "headGroupSpec/template/spec/containers/0/env"
AUTOSCALER_V2 = [{"name": "RAY_enable_autoscaler_v2", "value": "true"}]


def changed(name: str, changes: Changes) -> dict[str, Any]:
    """A manifest of ours with other values; a place below `spec` is written with slashes, others begin with one."""
    manifest = json.loads(json.dumps(load(CLUSTER / "kuberay" / f"{name}.yaml")))  # anchors become copies
    for place, value in changes.items():
        *way, last = place[1:].split("/") if place.startswith("/") else ["spec", *place.split("/")]
        node: Any = manifest
        for key in way:
            node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
        if value is GONE:
            del node[last]
        else:
            node[int(last) if isinstance(node, list) else last] = copy.deepcopy(value)
    return manifest


def cluster_spec() -> dict[str, Any]:
    return changed("raycluster", {})["spec"]


def own_cluster(**changes: Any) -> Changes:
    """A job that starts a cluster of its own, without the autoscaler."""
    return {"clusterSelector": GONE, "rayClusterSpec": cluster_spec() | {"enableInTreeAutoscaling": False}} | changes


def rule(policy: str, seconds: int = 0, **status: str) -> dict[str, Any]:
    return {"policy": policy, "condition": (status or {"jobStatus": "FAILED"}) | {"ttlSeconds": seconds}}


INCREMENTAL = {
    "type": "NewClusterWithIncrementalUpgrade",
    "clusterUpgradeOptions": {"stepSizePercent": 10, "intervalSeconds": 30, "gatewayClassName": "istio"},
}
PREFERENCE = [{"weight": 1, "preference": {"matchExpressions": [{"key": "zone", "operator": "Near"}]}}]
SERVED = {"rayClusterConfig/upgradeStrategy": {"type": "Recreate"}}

WRONG: list[tuple[str, Changes, str]] = [
    # fields
    ("raycluster", {"authOptions/mode": "on"}, "'on' is not one of"),
    ("raycluster", {"workerGroupSpecs/0/minReplica": 1}, "'minReplica' was unexpected"),
    ("raycluster", {"workerGroupSpecs/0/maxReplicas": "2"}, "'2' is not of type 'integer'"),
    ("raycluster", {"workerGroupSpecs/0/maxReplicas": 2**31}, "2147483648 is not a 'int32'"),
    ("raycluster", {f"{POD}/terminationGracePeriodSeconds": "soon"}, "'soon' is not of type"),
    ("raycluster", {f"{POD}/securityContexts": {}}, "'securityContexts' was unexpected"),
    ("raycluster", {f"{POD}/volumes/1/emptyDir/sizeLimit": "lots"}, "'lots' is not valid"),
    ("raycluster", {f"{BOX}/resources/limits/memory": "800 GB"}, "'800 GB' is not valid"),
    ("rayjob", {"entryPoint": "x"}, "'entryPoint' was unexpected"),
    ("rayjob", {"ttlSecondsAfterFinished": 2**31}, "is not a 'int32'"),
    ("rayjob", {"preRunningDeadlineSeconds": 0}, "0 is less than the minimum of 1"),
    ("rayjob", {"deletionStrategy": {}}, "is not valid under any of the given schemas"),
    ("rayservice", {"rayClusterConfig": GONE}, "'rayClusterConfig' is a required property"),
    ("rayservice", {"rayClusterConfig/headGroupSpec/template/spec/container": []}, "'container' was unexpected"),
    # names
    (
        "raycluster",
        {"/metadata/name": "a" * 54},
        "metadata.name: a RayCluster's has at most 53 characters, this has 54",
    ),
    ("rayjob", {"/metadata/name": "a" * 48}, "metadata.name: a RayJob's has at most 47"),
    ("rayservice", {"/metadata/name": "a" * 48}, "metadata.name: a RayService's has at most 47"),
    ("raycluster", {"/metadata/name": "1st"}, "1st is no DNS label"),
    # groups
    ("raycluster", {"workerGroupSpecs/0/minReplicas": 3}, "a100x8: minReplicas: 3 is not from 0 to maxReplicas, 2"),
    ("raycluster", {"workerGroupSpecs/0/minReplicas": -1}, "minReplicas: -1"),
    ("raycluster", {"headGroupSpec/rayStartParams": {"labels": "a=b"}}, "head: rayStartParams.labels"),
    ("raycluster", {"headGroupSpec/labels": {"a b": "c"}}, "head: labels: a b=c is no label"),
    (
        "raycluster",
        {"workerGroupSpecs/0/resources": {"GPU": "8"}, "workerGroupSpecs/0/rayStartParams": {"num-gpus": "8"}},
        "resources: given in rayStartParams as well",
    ),
    (
        "raycluster",
        {"workerGroupSpecs/0/idleTimeoutSeconds": 60},
        "idleTimeoutSeconds: needs autoscalerOptions.version",
    ),
    ("raycluster", {"workerGroupSpecs/0/suspend": True}, "suspend: not with autoscaling"),
    (
        "raycluster",
        {"autoscalerOptions/version": "v2", f"{POD}/restartPolicy": "Always"},
        "restartPolicy: Never or nothing",
    ),
    ("raycluster", {"autoscalerOptions/idleTimeoutSeconds": -1}, "idleTimeoutSeconds: negative"),
    ("raycluster", {f"{POD}/containers": []}, "a100x8: containers: none"),
    (
        "raycluster",
        {"autoscalerOptions/version": "v2", "workerGroupSpecs/0/idleTimeoutSeconds": -1},
        "a100x8: idleTimeoutSeconds: negative",
    ),
    ("raycluster", {HEAD_ENV: AUTOSCALER_V2, "enableInTreeAutoscaling": False}, "needs enableInTreeAutoscaling"),
    ("raycluster", {HEAD_ENV: AUTOSCALER_V2, "autoscalerOptions/version": "v2"}, "autoscalerOptions.version says it"),
    # authentication
    ("raycluster", {"rayVersion": GONE}, "authOptions.mode: token needs a rayVersion"),
    ("raycluster", {"rayVersion": "newest"}, "authOptions.mode: token needs a rayVersion"),
    ("raycluster", {"rayVersion": "2.40.0"}, "needs rayVersion 2.52.0, this is 2.40.0"),
    (
        "raycluster",
        {"authOptions/enableK8sTokenAuth": True, "rayVersion": "2.54.1"},
        "needs rayVersion 2.55.0, this is 2.54.1",
    ),
    ("raycluster", {"authOptions": {"enableK8sTokenAuth": True}}, "enableK8sTokenAuth: needs mode token"),
    # fault tolerance of the head
    (
        "raycluster",
        {HEAD_ENV: [{"name": "RAY_REDIS_ADDRESS", "value": "redis:6379"}]},
        "RAY_REDIS_ADDRESS: needs gcsFaultToleranceOptions",
    ),
    (
        "raycluster",
        {"gcsFaultToleranceOptions": {"redisAddress": "x"}, "headGroupSpec/rayStartParams": {"redis-password": "y"}},
        "redis-password: gcsFaultToleranceOptions says it",
    ),
    (
        "raycluster",
        {"gcsFaultToleranceOptions": {"redisAddress": "x"}, "/metadata/annotations": {"ray.io/ft-enabled": "true"}},
        "ray.io/ft-enabled: gcsFaultToleranceOptions says it",
    ),
    (
        "raycluster",
        {"headGroupSpec/rayStartParams": {"redis-username": "ray"}},
        "redis-username: use gcsFaultToleranceOptions.redisUsername",
    ),
    # jobs
    ("rayjob", {"clusterSelector": GONE}, "needs clusterSelector or rayClusterSpec"),
    ("rayjob", {"clusterSelector": {"ray.io/cluster": ""}}, "ray.io/cluster is empty"),
    ("rayjob", {"submissionMode": "SidecarMode", "submitterConfig": GONE}, "SidecarMode not with clusterSelector"),
    ("rayjob", own_cluster(submissionMode="SidecarMode"), "submitterConfig: not in SidecarMode"),
    ("rayjob", {"backoffLimit": 1}, "backoffLimit: 1"),
    ("rayjob", own_cluster(submissionMode="InteractiveMode", backoffLimit=1), "backoffLimit: 1"),
    ("rayjob", {"ttlSecondsAfterFinished": 60}, "ttlSecondsAfterFinished: is negative, or needs"),
    ("rayjob", {"activeDeadlineSeconds": 0}, "activeDeadlineSeconds: not positive"),
    ("rayjob", {"runtimeEnvYAML": "env_vars: {"}, "runtimeEnvYAML: not YAML"),
    ("rayjob", {"runtimeEnvYAML": "- a"}, "runtimeEnvYAML: not YAML"),
    ("rayjob", {"entrypoint": GONE}, "entrypoint: missing"),
    ("rayjob", {"suspend": True, "shutdownAfterJobFinishes": True}, "suspend: needs"),
    ("rayjob", {"deletionStrategy/deletionRules": [rule("DeleteCluster")]}, "not on the cluster of a clusterSelector"),
    (
        "rayjob",
        own_cluster(deletionStrategy={"deletionRules": [rule("DeleteSelf")]}, shutdownAfterJobFinishes=True),
        "deletionRules: not with shutdownAfterJobFinishes",
    ),
    (
        "rayjob",
        own_cluster(deletionStrategy={"deletionRules": [rule("DeleteCluster", 9), rule("DeleteSelf", 5)]}),
        "on FAILED, ttlSeconds fall",
    ),
    (
        "rayjob",
        own_cluster(deletionStrategy={"deletionRules": [rule("DeleteSelf"), rule("DeleteSelf")]}),
        "DeleteSelf twice on FAILED",
    ),
    (
        "rayjob",
        own_cluster(deletionStrategy={"onSuccess": {}, "onFailure": {}}),
        "onSuccess and onFailure need a policy",
    ),
    (
        "rayjob",
        own_cluster(shutdownAfterJobFinishes=True)
        | {"deletionStrategy": {"onSuccess": {"policy": "DeleteNone"}, "onFailure": {"policy": "DeleteSelf"}}},
        "DeleteNone not with shutdownAfterJobFinishes",
    ),
    (
        "rayjob",
        own_cluster(deletionStrategy={"deletionRules": [rule("DeleteWorkers")]}, rayClusterSpec=cluster_spec()),
        "DeleteWorkers not with autoscaling",
    ),
    (
        "rayjob",
        own_cluster(submissionMode="SidecarMode", submitterConfig=GONE)
        | {"rayClusterSpec/headGroupSpec/template/spec/restartPolicy": "Always"},
        "restartPolicy: Never or nothing in SidecarMode",
    ),
    # services
    ("rayservice", {"rayClusterConfig/headGroupSpec/headService": {"metadata": {"name": "x"}}}, "its name belongs to"),
    ("rayservice", {"upgradeStrategy": {"type": INCREMENTAL["type"]}}, "needs clusterUpgradeOptions"),
    (
        "rayservice",
        {"upgradeStrategy": INCREMENTAL, "rayClusterConfig/enableInTreeAutoscaling": False},
        "NewClusterWithIncrementalUpgrade needs autoscaling",
    ),
    (
        "rayservice",
        {"upgradeStrategy": INCREMENTAL, "upgradeStrategy/clusterUpgradeOptions/stepSizePercent": 101},
        "percents are from 0 to 100",
    ),
    (
        "rayservice",
        {"upgradeStrategy": INCREMENTAL, "upgradeStrategy/clusterUpgradeOptions/gatewayClassName": ""},
        "gatewayClassName is empty",
    ),
    ("rayservice", SERVED, "upgradeStrategy: not of a cluster that KubeRay makes"),
    # pods
    (
        "raycluster",
        {
            f"{POD}/affinity/nodeAffinity/preferredDuringSchedulingIgnoredDuringExecution/0/preference": {
                "matchExpressions": [{"key": "zone", "operator": "In"}]
            }
        },
        "zone: In without values",
    ),
    (
        "raycluster",
        {f"{BOX}/ports": [{"name": "a-name-too-long-x", "containerPort": 1}]},
        "a-name-too-long-x is no name",
    ),
    ("raycluster", {f"{BOX}/ports": [{"containerPort": 65536}]}, "65536 is no port"),
    ("raycluster", {f"{BOX}/image": GONE}, "ray-worker: image: none"),
    ("raycluster", {f"{POD}/volumes/1/name": "shared"}, "volumes: shared twice"),
    (
        "raycluster",
        {f"{POD}/affinity": {"podAffinity": {"x": 1}}},
        "'x' was unexpected",
    ),
    (
        "raycluster",
        {f"{POD}/affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": PREFERENCE}}},
        "zone: Near is no operator",
    ),
    ("raycluster", {f"{BOX}/volumeMounts/0/name": "nowhere"}, "ray-worker: volumeMounts: no volume nowhere"),
    (
        "raycluster",
        {f"{BOX}/resources/requests": {"nvidia.com/gpu": "4"}},
        "nvidia.com/gpu is not the same in requests and limits",
    ),
    ("raycluster", {f"{POD}/tolerations/0/value": "x"}, "tolerations: Exists with a value"),
]

RIGHT: list[tuple[str, Changes]] = [
    ("raycluster", {"/metadata/namespace": "models", "/metadata/labels": {"team": "nlp"}}),
    ("raycluster", {"/metadata/name": "a" * 53}),
    ("rayjob", {"/metadata/name": "a" * 47}),
    ("raycluster", {"workerGroupSpecs/0/minReplicas": GONE, "workerGroupSpecs/0/maxReplicas": GONE}),
    ("raycluster", {"workerGroupSpecs/0/maxReplicas": 2**31 - 1}),
    ("raycluster", {"rayVersion": "2.60"}),
    ("raycluster", {"rayVersion": "2.52"}),
    ("raycluster", {"rayVersion": GONE, "authOptions": GONE}),
    ("raycluster", {f"{BOX}/resources": {"limits": {"cpu": 8, "memory": "1.5G", "ephemeral-storage": "2Ei"}}}),
    *(("raycluster", {f"{POD}/volumes/1/emptyDir/sizeLimit": f"1{unit}"}) for unit in ("k", "M", "G", "T", "P", "E")),
    *(("raycluster", {f"{POD}/volumes/1/emptyDir/sizeLimit": size}) for size in ("1Pi", "1Ei", "500m", "1e9", "2.5Gi")),
    (
        "raycluster",
        {"authOptions/secretName": "ray.token", f"{POD}/volumes/0/persistentVolumeClaim/claimName": "cllm.shared"},
    ),
    ("rayjob", {"submissionMode": "InteractiveMode", "entrypoint": GONE}),
    ("rayjob", {"rayClusterSpec": cluster_spec()}),
    ("rayjob", own_cluster(submissionMode="SidecarMode", submitterConfig=GONE)),
    (
        "rayjob",
        own_cluster(shutdownAfterJobFinishes=True, ttlSecondsAfterFinished=60, suspend=True, backoffLimit=2)
        | {"metadata": {"a": "b"}, "jobId": "x", "managedBy": "ray.io/kuberay-operator", "entrypointNumCpus": 0.5}
        | {"entrypointNumGpus": 1, "entrypointResources": '{"spot": 1}', "preRunningDeadlineSeconds": 600}
        | {"submitterPodTemplate": {"spec": {"containers": [{"name": "submit", "image": "x"}]}}},
    ),
    (
        "rayjob",
        own_cluster(
            deletionStrategy={
                "deletionRules": [rule("DeleteWorkers"), rule("DeleteSelf", 9, jobDeploymentStatus="Failed")]
            }
        ),
    ),
    (
        "rayjob",
        own_cluster(deletionStrategy={"onSuccess": {"policy": "DeleteCluster"}, "onFailure": {"policy": "DeleteNone"}}),
    ),
    ("rayservice", {"serveConfigV2": GONE}),
    (
        "rayservice",
        {"upgradeStrategy": INCREMENTAL, "rayClusterDeletionDelaySeconds": 0, "managedBy": "ray.io/kuberay-operator"}
        | {"serveService": {"metadata": {"name": "x"}, "spec": {"type": "ClusterIP"}}}
        | {"serviceUnhealthySecondThreshold": 900, "deploymentUnhealthySecondThreshold": 300},
    ),
    (
        "raycluster",
        {
            "authOptions/enableK8sTokenAuth": True,
            "autoscalerOptions": {
                "resources": {"limits": {"cpu": "1", "memory": "1Gi"}},
                "image": "x",
                "imagePullPolicy": "Always",
                "securityContext": {"runAsNonRoot": True},
                "env": [{"name": "A", "value": "b"}],
                "envFrom": [{"secretRef": {"name": "s"}}],
                "volumeMounts": [{"name": "shared", "mountPath": "/shared"}],
                "version": "v2",
            },
            "suspend": False,
            "managedBy": "kueue.x-k8s.io/multikueue",
            "headServiceAnnotations": {"a": "b"},
            "gcsFaultToleranceOptions": {
                "redisAddress": "redis:6379",
                "redisUsername": {"value": "ray"},
                "redisPassword": {"valueFrom": {"secretKeyRef": {"name": "redis", "key": "password"}}},
                "externalStorageNamespace": "cllm",
            },
            "upgradeStrategy": {"type": "Recreate"},
            "headGroupSpec/headService": {"spec": {"type": "ClusterIP"}},
            "headGroupSpec/resources": {"CPU": "0"},
            "headGroupSpec/labels": {"ray.io/market-type": "on-demand"},
            "headGroupSpec/template/metadata": {"labels": {"a": "b"}, "annotations": {"c": "d"}},
            "workerGroupSpecs/0/idleTimeoutSeconds": 60,
            "workerGroupSpecs/0/resources": {"GPU": "8"},
            "workerGroupSpecs/0/labels": {"gpu": "a100"},
            "workerGroupSpecs/0/numOfHosts": 1,
            "workerGroupSpecs/0/scaleStrategy": {"workersToDelete": ["pod-1"]},
            "workerGroupSpecs/0/suspend": False,
        },
    ),
]
