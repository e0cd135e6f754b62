"""The files under test."""

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
RAY_UP = sorted(CLUSTER.glob("*.yaml"))
KUBERAY = sorted((CLUSTER / "kuberay").glob("*.yaml"))
GUIDE = ROOT / "docs" / "cluster.md"


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def pins() -> dict[str, str]:
    """Package -> version in cluster/constraints.txt."""
    return dict(re.findall(r"^([\w-]+)==(\S+)$", (CLUSTER / "constraints.txt").read_text(), re.MULTILINE))
