"""What the files and the guide name exists: paths, jobs, recipes and their keys, pods and services; and the guide's
estimate is what the program prints.
"""

import re
import shlex
from pathlib import Path

import pytest

from cllm.recipes import get_recipe
from jobs import estimate
from jobs.cli import main
from tests.cluster.files import CLUSTER, GUIDE, ROOT, load

FILES = [GUIDE, *(path for path in CLUSTER.rglob("*") if path.is_file() and path.suffix != ".pyc")]
NAMED = re.compile(r"(?<![\w./:-])(?:/opt/cllm/)?((?:cllm|jobs|serving|cluster|docs|tests|results)/[\w./-]*\w)")
WRITTEN = {"results/engine.json"}  # made by a command in the guide


def text_of(path: Path) -> str:
    """With commands that go over several lines as one line each."""
    return path.read_text().replace("\\\n", " ")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_named_paths_exist(path: Path) -> None:
    named = set(NAMED.findall(text_of(path))) - WRITTEN
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


def test_named_paths_are_found_at_all() -> None:
    assert {"jobs/pipeline.py", "cluster/aws-a100.yaml"} <= set(NAMED.findall(text_of(GUIDE)))
    assert NAMED.findall("python /opt/cllm/jobs/pipeline.py") == ["jobs/pipeline.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_named_recipes_and_keys_exist(path: Path) -> None:
    for recipe, rest in re.findall(r"--recipe ([\w-]+)((?: --set \S+)*)", text_of(path)):
        get_recipe(recipe).with_overrides(re.findall(r"--set (\S+)", rest))
    for override in re.findall(r"`[^`\n]*--set [^`\n]*`", text_of(path)):
        get_recipe("paper-gsm8k").with_overrides(re.findall(r"--set ([^\s`]+)", override))


def test_job_of_the_manifest_is_the_pipeline_on_shared_storage() -> None:
    words = shlex.split(load(CLUSTER / "kuberay" / "rayjob.yaml")["spec"]["entrypoint"])
    assert words[:2] == ["python", "/opt/cllm/jobs/pipeline.py"]
    assert re.search(r"^WORKDIR /opt/cllm$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    (override,) = [word for word in words if word.startswith("output=")]
    assert override.startswith("output=/shared/")


def test_kubernetes_names_in_the_guide_follow_from_the_manifests() -> None:
    service = load(CLUSTER / "kuberay" / "rayservice.yaml")["metadata"]["name"]
    cluster = load(CLUSTER / "kuberay" / "raycluster.yaml")
    assert f"service/{service}-serve-svc 8000" in GUIDE.read_text()
    assert f"service/{cluster['metadata']['name']}-head-svc" in (CLUSTER / "kuberay" / "raycluster.yaml").read_text()
    assert f"create secret generic {cluster['spec']['authOptions']['secretName']} " in GUIDE.read_text()


def test_the_estimate_in_the_guide_is_what_the_program_prints(capsys: pytest.CaptureFixture[str]) -> None:
    _, _, rest = GUIDE.read_text().partition("<!-- estimate -->\n")
    command, _, rest = rest.partition("\n\n")
    shown, _, _ = rest.partition("\n\nMost of it")
    program, script, *arguments = shlex.split(command.replace("\\\n", " "))
    assert (program, script) == ("python", "jobs/estimate.py")
    assert main(estimate.run, estimate.__doc__, arguments, add_arguments=estimate.add_arguments) == 0
    *printed, _ = capsys.readouterr().out.strip().splitlines()
    assert "\n".join(printed).strip() == shown
