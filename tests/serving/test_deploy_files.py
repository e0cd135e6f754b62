"""The YAML files beside the application are what Serve and the application take."""

import re
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from serving.config import AppConfig

FILES = sorted((Path(__file__).parents[2] / "serving").glob("*.yaml"))


def test_they_are_found() -> None:
    assert {file.name for file in FILES} >= {"laptop.yaml", "gpu.yaml"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_they_are_valid(file: Path) -> None:
    data = yaml.safe_load(file.read_text())
    for application in ServeDeploySchema.model_validate(data).applications:
        assert application.import_path == "serving.build:app"
        config = AppConfig.from_data(application.args, where=file.name)
        assert {model.options.window > 1 for model in config.models.values()} == {True, False}  # Jacobi and AR


def test_the_entries_in_comments_are_valid_and_of_every_kind() -> None:
    (file,) = [file for file in FILES if file.name == "gpu.yaml"]
    data = yaml.safe_load(re.sub(r"(?m)^( +)# (?=\S+:( |$)|  )", r"\1", file.read_text()))
    (application,) = data["applications"]
    models = AppConfig.from_data(application["args"], where=file.name).models
    kinds = {getattr(model.options, "method", model.engine) for model in models.values()}
    assert kinds == {"cllm", "jacobi", "ar", "draft_model"}
    assert max(model.world for model in models.values()) == 4


def test_only_the_laptop_goes_without_keys_and_stays_at_home() -> None:
    for file in FILES:
        data = yaml.safe_load(file.read_text())
        is_open = any(application["args"].get("keys") is None for application in data["applications"])
        assert is_open == (data["http_options"]["host"] == "127.0.0.1")
