"""What Kubernetes checks of a pod beyond its schema. KubeRay passes a group's pod on, so that it would fail there."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

Data = Mapping[str, Any]
_PORT_NAME = re.compile(r"(?=.*[a-z])(?!.*--)[a-z0-9]([-a-z0-9]{0,13}[a-z0-9])?")


def pod_mistakes(pod: Data) -> Iterator[str]:
    """One line each, of the `spec` of a template that fits the schema."""
    containers = pod.get("containers") or []
    if not containers:
        yield "containers: none"
    volumes = [volume["name"] for volume in pod.get("volumes") or []]
    yield from (f"volumes: {name} twice" for name in sorted({name for name in volumes if volumes.count(name) > 1}))
    for container in [*(pod.get("initContainers") or []), *containers]:
        yield from (f"{container['name']}: {mistake}" for mistake in _container(container, volumes))
    for tolerations in pod.get("tolerations") or []:
        if tolerations.get("operator") == "Exists" and tolerations.get("value"):
            yield "tolerations: Exists with a value"
    yield from _expressions(pod.get("affinity") or {})


def _container(container: Data, volumes: list[str]) -> Iterator[str]:
    if not container.get("image"):
        yield "image: none"
    for mount in container.get("volumeMounts") or []:
        if mount["name"] not in volumes:
            yield f"volumeMounts: no volume {mount['name']}"
    for port in container.get("ports") or []:
        if not 0 < port["containerPort"] < 65536:
            yield f"ports: {port['containerPort']} is no port"
        if "name" in port and not _PORT_NAME.fullmatch(port["name"]):
            yield f"ports: {port['name']} is no name of a port (15 of a-z, 0-9 and -)"
    limits = (container.get("resources") or {}).get("limits") or {}
    requests = (container.get("resources") or {}).get("requests") or {}
    for name in limits.keys() | requests.keys():
        if "/" in name and limits.get(name) != requests.get(name, limits.get(name)):
            yield f"resources: {name} is not the same in requests and limits"


def _expressions(data: Any) -> Iterator[str]:
    """Of all selectors at any depth."""
    if isinstance(data, list):
        for item in data:
            yield from _expressions(item)
    elif isinstance(data, Mapping):
        if "operator" in data and "key" in data:
            needs = data["operator"] in ("In", "NotIn", "Gt", "Lt")
            if not needs and data["operator"] not in ("Exists", "DoesNotExist"):
                yield f"{data['key']}: {data['operator']} is no operator"
            elif needs != bool(data.get("values")):
                yield f"{data['key']}: {data['operator']} {'without' if needs else 'with'} values"
        for value in data.values():
            yield from _expressions(value)
