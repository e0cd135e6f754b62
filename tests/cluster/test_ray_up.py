"""The files for `ray up` pass Ray's own checks, keep Ray's ports to themselves, and install what the project pins."""

import copy
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ray.autoscaler._private.util import hash_runtime_conf, prepare_config, validate_config

from tests.cluster.files import CLUSTER, RAY_UP, ROOT, load

pytestmark = pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.stem)


def commands(config: dict[str, Any]) -> list[str]:
    return [command for key, value in config.items() if key.endswith("_commands") for command in value]


def test_ray_accepts_the_file(path: Path) -> None:
    config = prepare_config(load(path))
    validate_config(config)
    assert config["head_node_type"] == "head"
    broken = copy.deepcopy(config) | {"idle_timeout": 5}
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout"):
        validate_config(broken)


def test_the_head_has_no_gpu_and_workers_start_only_when_asked_for(path: Path) -> None:
    config = prepare_config(load(path))
    types = config["available_node_types"]
    head = types.pop("head")["node_config"]
    assert head.get("InstanceType", head.get("machineType")).startswith(("m6i.", "e2-standard-"))
    assert all(kind["min_workers"] == 0 for kind in types.values())
    assert 0 < sum(kind["max_workers"] for kind in types.values()) <= config["max_workers"]
    machines = {
        kind["node_config"].get("InstanceType", kind["node_config"].get("machineType")) for kind in types.values()
    }
    assert machines in ({"p4d.24xlarge", "p4de.24xlarge"}, {"a2-highgpu-8g", "a2-ultragpu-8g"})
    assert 5 <= config["idle_timeout_minutes"] <= 60


def test_the_groups_that_start_by_default_are_spot_machines(path: Path) -> None:
    for name, kind in load(path)["available_node_types"].items():
        node = kind["node_config"]
        spot = node.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        spot = spot or node.get("scheduling", {}).get("provisioningModel") == "SPOT"
        assert spot == name.endswith("_spot")
        if kind.get("max_workers") and name != "head":
            assert spot


def test_every_ray_process_starts_with_token_authentication(path: Path) -> None:
    config = load(path)
    starts = [command for command in commands(config) if "ray start" in command]
    assert len(starts) == 2
    assert all(command.startswith(". ~/.cllm_env; ") for command in starts)
    (environment,) = [command for command in config["setup_commands"] if "> ~/.cllm_env" in command]
    assert "export RAY_AUTH_MODE=token" in environment
    assert "RAY_AUTH_TOKEN=" not in path.read_text(), "a token belongs into a file that is not committed"
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert config["setup_commands"][0] == "chmod 600 ~/.ray/auth_token"


def test_no_port_is_open_but_ssh(path: Path) -> None:
    """Dashboard and job server (8265) listen on the loopback device; no rule lets anybody reach the other ports."""
    config = load(path)
    (head,) = [command for command in config["head_start_ray_commands"] if "ray start" in command]
    assert re.findall(r"--dashboard-host=(\S+)", head) == ["127.0.0.1"]
    assert "--ray-client-server-port" not in head
    assert "security_group" not in config["provider"], "its IpPermissions would open ports"
    assert "docker" not in config, "its run_options could publish ports"
    if config["provider"]["type"] == "aws":
        nodes = [kind["node_config"] for kind in config["available_node_types"].values()]
        assert all(node["SecurityGroupIds"] for node in nodes), "without one, Ray lets in ssh from everywhere"
    assert "0.0.0.0/0" not in path.read_text()


def test_mounted_files_exist_and_hold_the_project(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("a" * 64)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(ROOT)
    mounts = load(path)["file_mounts"]
    hash_runtime_conf(mounts, None, {})  # reads every file, as `ray up` does
    assert {"pyproject.toml", "cllm", "jobs", "serving", "cluster/constraints.txt"} <= set(mounts.values())
    assert all(remote == f"~/cllm/{local}" for remote, local in mounts.items() if "token" not in local)


def test_the_project_is_installed_with_the_gpu_extra_and_the_pins(path: Path) -> None:
    config = load(path)
    installs = [command for command in commands(config) if "pip install" in command]
    assert "~/venv/bin/pip install -q -c ~/cllm/cluster/constraints.txt -e ~/cllm[gpu]" in installs
    others = [command for command in installs if "~/cllm" not in command]
    assert all(re.search(r"\w+==[\d.]+$", command) for command in others), "not pinned"


def test_shared_storage_is_mounted_or_the_node_fails(path: Path) -> None:
    commands = load(path)["setup_commands"]
    mount = next(index for index, command in enumerate(commands) if "sudo mount -t nfs" in command)
    assert commands[mount + 1].startswith("mountpoint -q /shared && ")


def test_both_clouds_set_nodes_up_alike(path: Path) -> None:
    """Two files for want of includes in Ray's format: what is no matter of the cloud must not drift apart."""
    other, mine = load(CLUSTER / "aws-a100.yaml"), load(path)
    for key in ("file_mounts", "rsync_exclude", "idle_timeout_minutes", "worker_start_ray_commands"):
        assert mine[key] == other[key]
    assert mine["head_start_ray_commands"] == other["head_start_ray_commands"]
    same = [command for command in mine["setup_commands"] if "sudo mount" not in command]
    assert same == [command for command in other["setup_commands"] if "sudo mount" not in command]
