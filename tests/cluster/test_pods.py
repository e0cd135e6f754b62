"""What Kubernetes itself reads of the manifests, against its own schemas: pods, the volume claim, the network policy.

KubeRay puts a group's template into pods as it is, so a field that Kubernetes does not know would fail there at last.
"""

import copy
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.files import KUBERAY, load

kubernetes = pytest.importorskip(
    "kubernetes_validate", reason="kubernetes-validate is not installed (pip install kubernetes-validate)"
)
PLAIN = [path for path in KUBERAY if load(path)["apiVersion"] != "ray.io/v1"]


def templates() -> dict[str, dict[str, Any]]:
    """Pods of all groups, by file and group."""
    found = {}
    for path in KUBERAY:
        spec = load(path)["spec"]
        spec = spec.get("rayClusterConfig", spec)
        if "headGroupSpec" in spec:
            found[f"{path.stem}-head"] = spec["headGroupSpec"]["template"]
            found |= {f"{path.stem}-{g['groupName']}": g["template"] for g in spec["workerGroupSpecs"]}
    return found


def check(manifest: dict[str, Any]) -> None:
    kubernetes.validate(manifest, kubernetes.latest_version(), strict=True)


def as_pod(template: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}} | template


def test_both_clusters_have_a_head_and_a_group() -> None:
    assert len(templates()) == 4
    assert {load(path)["kind"] for path in PLAIN} == {"PersistentVolumeClaim", "NetworkPolicy"}


@pytest.mark.parametrize("path", PLAIN, ids=lambda path: path.stem)
def test_manifest_fits_kubernetes(path: Path) -> None:
    check(load(path))


@pytest.mark.parametrize("name", templates())
def test_pod_fits_kubernetes(name: str) -> None:
    check(as_pod(templates()[name]))


@pytest.mark.parametrize(
    ("key", "value"), [("securityContexts", {}), ("volumes", [{"nam": "shared"}]), ("containers", [{"image": "x"}])]
)
def test_mistakes_are_found(key: str, value: Any) -> None:
    template = copy.deepcopy(templates()["raycluster-head"])
    template["spec"][key] = value
    with pytest.raises(kubernetes.ValidationError):
        check(as_pod(template))
