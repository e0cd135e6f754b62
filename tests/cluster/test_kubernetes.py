"""What Kubernetes itself reads of the manifests, against its own schemas: the volume claim and the network policy.

Those of the pods are checked with the manifests of KubeRay (`tests/cluster/kuberay.py`).
"""

from pathlib import Path
from typing import Any

import pytest

from tests.cluster.files import KUBERAY, load

kubernetes = pytest.importorskip(
    "kubernetes_validate", reason="kubernetes-validate is not installed (pip install kubernetes-validate)"
)
PLAIN = [path for path in KUBERAY if load(path)["apiVersion"] != "ray.io/v1"]


def check(manifest: dict[str, Any]) -> None:
    kubernetes.validate(manifest, kubernetes.latest_version(), strict=True)


def test_both_kinds_are_there() -> None:
    assert {load(path)["kind"] for path in PLAIN} == {"PersistentVolumeClaim", "NetworkPolicy"}


@pytest.mark.parametrize("path", PLAIN, ids=lambda path: path.stem)
def test_manifest_fits_kubernetes(path: Path) -> None:
    check(load(path))


@pytest.mark.parametrize("path", PLAIN, ids=lambda path: path.stem)
def test_mistakes_are_found(path: Path) -> None:
    manifest = load(path)
    manifest["spec"]["polcy"] = []
    with pytest.raises(kubernetes.ValidationError):
        check(manifest)
