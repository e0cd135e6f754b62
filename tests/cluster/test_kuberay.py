"""The manifests for KubeRay: their fields, what Ray's autoscaler makes of them, and that nothing is open to the world.

They are checked against our own list of KubeRay's fields and rules (`tests/cluster/kuberay.py`). Its CRDs lie on GitHub
and in its Helm chart, and continuous integration reaches package indexes only, so there the check against them is
skipped. It runs where KUBERAY_CRDS names a folder with the CRD files (`helm pull kuberay/kuberay-operator --untar` has
them in crds/).
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import validate_config
from ray.serve.schema import ServeDeploySchema

from serving.config import AppConfig
from tests.cluster.files import CLUSTER, KUBERAY, ROOT, load, pins
from tests.cluster.kuberay import mistakes

RAY = [path for path in KUBERAY if load(path)["apiVersion"] == "ray.io/v1"]


def cluster_spec(manifest: dict[str, Any]) -> dict[str, Any] | None:
    return manifest["spec"] if manifest["kind"] == "RayCluster" else manifest["spec"].get("rayClusterConfig")


def clusters() -> dict[str, dict[str, Any]]:
    specs = {path.stem: cluster_spec(load(path)) for path in RAY}
    return {name: spec for name, spec in specs.items() if spec is not None}


def pods(spec: dict[str, Any]) -> list[dict[str, Any]]:
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def strict(schema: Any) -> Any:
    """A CRD's schema with unknown fields forbidden, as `kubectl apply --validate=strict` has it."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(value) for key, value in schema.items()}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed


def keys(data: Any) -> Iterator[tuple[str, Any]]:
    """All keys with their values, at any depth."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield key, value
            yield from keys(value)
    elif isinstance(data, list):
        for item in data:
            yield from keys(item)


def test_the_three_kinds_are_there() -> None:
    assert sorted(load(path)["kind"] for path in RAY) == ["RayCluster", "RayJob", "RayService"]


@pytest.mark.parametrize("path", RAY, ids=lambda path: path.stem)
def test_kuberay_takes_the_manifest(path: Path) -> None:
    assert mistakes(load(path)) == []


def test_every_cluster_has_a_head_service_of_its_own() -> None:
    """KubeRay calls the head's service of a RayCluster and that of a RayService NAME-head-svc: there must not be two.

    A RayService also makes clusters called NAME-xxxxx, with five random characters.
    """
    names = [load(path)["metadata"]["name"] for path in RAY if load(path)["kind"] in ("RayCluster", "RayService")]
    assert len(names) == len(set(names)) == 2
    (service,) = (load(path)["metadata"]["name"] for path in RAY if load(path)["kind"] == "RayService")
    assert not [name for name in names if re.fullmatch(rf"{service}-[a-z0-9]{{5}}", name)]


@pytest.mark.skipif("KUBERAY_CRDS" not in os.environ, reason="KUBERAY_CRDS is not set")
@pytest.mark.parametrize("path", RAY, ids=lambda path: path.stem)
def test_manifest_fits_the_crd(path: Path) -> None:
    manifest = load(path)
    crds = [load(file) for file in Path(os.environ["KUBERAY_CRDS"]).glob("*.yaml")]
    (crd,) = [crd for crd in crds if crd["spec"]["names"]["kind"] == manifest["kind"]]
    (schema,) = [v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"] if v["name"] == "v1"]
    jsonschema.validate(manifest, strict(schema))


def test_strict_forbids_unknown_fields_only_where_a_crd_lists_them() -> None:
    schema = strict(
        {
            "properties": {
                "typed": {"type": "object", "properties": {"a": {"type": "integer"}}},
                "map": {"type": "object", "additionalProperties": {"type": "string"}},
                "free": {"properties": {}, "x-kubernetes-preserve-unknown-fields": True},
            }
        }
    )
    jsonschema.validate({"typed": {"a": 1}, "map": {"any": "x"}, "free": {"any": 1}}, schema)
    with pytest.raises(jsonschema.ValidationError, match="'b' was unexpected"):
        jsonschema.validate({"typed": {"b": 1}}, schema)


@pytest.mark.parametrize("name", clusters())
def test_rays_autoscaler_reads_the_groups(name: str) -> None:
    """The very function that turns a RayCluster into the autoscaler's configuration, without Kubernetes."""
    resource = {"metadata": {"name": "cllm", "namespace": "default"}, "spec": clusters()[name]}
    config = _derive_autoscaling_config_from_ray_cr(resource)
    validate_config(config)
    types = config["available_node_types"]
    group = clusters()[name]["workerGroupSpecs"][0]
    worker, head = types[group["groupName"]], types["headgroup"]
    assert head["resources"].get("GPU", 0) == 0
    gpus = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert worker["resources"]["GPU"] == gpus
    assert (worker["min_workers"], worker["max_workers"]) == (group["minReplicas"], group["maxReplicas"])
    assert config["idle_timeout_minutes"] == clusters()[name]["autoscalerOptions"]["idleTimeoutSeconds"] / 60


@pytest.mark.parametrize("name", clusters())
def test_token_authentication_is_on(name: str) -> None:
    spec = clusters()[name]
    assert spec["authOptions"] == {"mode": "token", "secretName": "cllm-ray-token"}
    settings = [entry for pod in pods(spec) for entry in pod["containers"][0].get("env", [])]
    assert not [entry for entry in settings if entry["name"].startswith("RAY_AUTH")], "authOptions sets them"


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.stem)
def test_nothing_is_open_to_the_world(path: Path) -> None:
    manifest = load(path)
    assert manifest["kind"] not in ("Ingress", "Service", "Gateway", "HTTPRoute")
    found = list(keys(manifest))
    assert {value for key, value in found if key == "serviceType"} <= {"ClusterIP"}
    assert not {"hostPort", "hostNetwork", "enableIngress", "serveService", "headService"} & {key for key, _ in found}


def test_network_policy_selects_rays_pods_and_lets_in_this_namespace_and_the_operator_only() -> None:
    spec = load(CLUSTER / "kuberay" / "network-policy.yaml")["spec"]
    assert spec["podSelector"] == {"matchExpressions": [{"key": "ray.io/cluster", "operator": "Exists"}]}
    assert spec["policyTypes"] == ["Ingress"]
    peers = [peer for rule in spec["ingress"] for peer in rule["from"]]
    assert peers == [
        {"podSelector": {}},
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kuberay-system"}}},
    ]


@pytest.mark.parametrize("name", clusters())
def test_pods_share_the_storage_and_run_without_rights(name: str) -> None:
    claim = load(CLUSTER / "kuberay" / "shared-volume.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods(clusters()[name]):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        (container,) = pod["containers"]
        assert {"name": "shared", "mountPath": "/shared"} in container["volumeMounts"]
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
        assert pod["securityContext"]["runAsNonRoot"]
        assert not container["securityContext"]["allowPrivilegeEscalation"]


def test_ray_version_is_the_pinned_one() -> None:
    assert {spec["rayVersion"] for spec in clusters().values()} == {pins()["ray"]}


def test_service_deploys_the_file_for_gpus() -> None:
    """serving/gpu.yaml, word for word in meaning: KubeRay wants it inside its manifest."""
    service = load(CLUSTER / "kuberay" / "rayservice.yaml")
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    assert config == load(ROOT / "serving" / "gpu.yaml")
    ServeDeploySchema.model_validate(config)
    (application,) = config["applications"]
    app = AppConfig.from_data(application["args"], where="args")
    group = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    most = sum(m.replicas if isinstance(m.replicas, int) else m.replicas.max_replicas for m in app.models.values())
    app.check_fits({"GPU": group["minReplicas"]})
    assert group["maxReplicas"] == most
    drain = max(model.drain_s for model in app.models.values())
    assert group["template"]["spec"]["terminationGracePeriodSeconds"] > drain


def test_serving_pods_are_ready_when_serve_answers() -> None:
    spec = clusters()["rayservice"]
    (container,) = spec["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    assert container["readinessProbe"]["httpGet"] == {"path": "/-/healthz", "port": 8000}
    assert 8000 in [port["containerPort"] for port in container["ports"]]


def test_job_runs_on_the_cluster() -> None:
    job, cluster = load(CLUSTER / "kuberay" / "rayjob.yaml"), load(CLUSTER / "kuberay" / "raycluster.yaml")
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
