"""Whether KubeRay takes a manifest: its fields, what the operator checks of them, what Kubernetes checks of pods."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from referencing import Registry, Resource

from tests.cluster.kuberay_rules import INT32_MAX, rule_mistakes

kubernetes = pytest.importorskip(
    "kubernetes_validate", reason="kubernetes-validate is not installed (pip install kubernetes-validate)"
)

_QUANTITY = {
    "anyOf": [
        {"type": "integer"},
        {
            "type": "string",
            "pattern": r"^\+?([0-9]+(\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]+)?$",
        },
    ]
}


def mistakes(manifest: dict[str, Any]) -> list[str]:
    """One line each. Those of the schema come alone: the rules read what fits it."""
    found = [f"{error.json_path}: {error.message}" for error in _validator().iter_errors(manifest)]
    return found or list(rule_mistakes(manifest))


@cache
def _validator() -> jsonschema.Draft202012Validator:
    """`kuberay_schema.json` on Kubernetes' strict definitions, in which quantities get the pattern that CRDs have."""
    folder = f"kubernetes-json-schema/v{kubernetes.latest_version()}-local-strict"
    definitions = json.loads((Path(kubernetes.__file__).parent / folder / "_definitions.json").read_text())
    definitions["$defs"]["io.k8s.apimachinery.pkg.api.resource.Quantity"] = _QUANTITY
    schema = json.loads((Path(__file__).parent / "kuberay_schema.json").read_text())
    registry: Registry[Any] = Resource.from_contents(definitions) @ Registry()
    formats = jsonschema.FormatChecker(formats=())
    formats.checks("int32")(lambda value: not isinstance(value, int) or -INT32_MAX - 1 <= value <= INT32_MAX)
    return jsonschema.Draft202012Validator(schema, registry=registry, format_checker=formats)
