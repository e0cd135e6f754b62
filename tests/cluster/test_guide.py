"""The guide's commands for AWS wait for what they need: run by a shell, against an `aws` that takes its time."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.cluster.files import GUIDE

# As AWS does, it refuses a mount target until the file system is available. Both are so from the third look on.
AWS = r"""#!/bin/sh
looks() { count=$(($(cat "$STATE/$1" 2> /dev/null || echo 0) + 1)); echo $count > "$STATE/$1"; }
state() { looks "$1"; [ $count -ge 3 ] && echo available || echo creating; }
case "$1 $2" in
"efs create-file-system") echo fs-1 ;;
"efs describe-file-systems") state files ;;
"efs create-mount-target")
    [ "$(cat "$STATE/files" 2> /dev/null || echo 0)" -ge 3 ] || { echo "file system not available" >&2; exit 254; }
    echo 0 > "$STATE/target" ;;
"efs describe-mount-targets") state target ;;
*) echo "unexpected: $*" >&2; exit 252 ;;
esac
"""


@pytest.fixture
def commands(tmp_path: Path) -> str:
    """What the guide says from the file system to its mount target, with pauses that a test can wait for."""
    lines = GUIDE.read_text().splitlines()
    first = next(index for index, line in enumerate(lines) if "aws efs create-file-system" in line)
    last = max(index for index, line in enumerate(lines) if "aws efs" in line and line.startswith("    "))
    (tmp_path / "aws").write_text(AWS)
    (tmp_path / "aws").chmod(0o755)
    text = "\n".join(line.strip() for line in lines[first : last + 1] if line.startswith("    "))
    return text.replace("sleep ", "sleep 0.0")


def test_the_file_system_and_its_mount_target_are_waited_for(commands: str, tmp_path: Path) -> None:
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "STATE": str(tmp_path)}
    environment |= {"SUBNET": "subnet-1", "GROUP": "sg-1"}
    done = subprocess.run(["bash", "-eu", "-c", commands], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "files").read_text() == "3\n"
    assert (tmp_path / "target").read_text() == "3\n"
