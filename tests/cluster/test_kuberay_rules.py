"""The check of manifests finds what KubeRay or Kubernetes would refuse, and lets pass what they take."""

import pytest

from tests.cluster.kuberay import mistakes
from tests.cluster.kuberay_cases import RIGHT, WRONG, Changes, changed


@pytest.mark.parametrize(("name", "changes", "message"), WRONG, ids=[message for _, _, message in WRONG])
def test_what_would_be_refused_is_found(name: str, changes: Changes, message: str) -> None:
    found = mistakes(changed(name, changes))
    assert any(message in mistake for mistake in found), found


@pytest.mark.parametrize(("name", "changes"), RIGHT, ids=[" ".join((name, *changes))[:80] for name, changes in RIGHT])
def test_what_would_be_taken_passes(name: str, changes: Changes) -> None:
    assert mistakes(changed(name, changes)) == []
