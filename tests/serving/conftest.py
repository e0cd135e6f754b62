"""A tiny random Llama in a folder, a replica of it in this process, and an HTTP server in front."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from serving.replica import Replica
from tests.serving.running import MODEL_NAME, Server, local_app, model_entry, save_tiny_model, serving_on_a_port


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def replica(model_folder: Path) -> Iterator[Replica]:
    replica = Replica(MODEL_NAME, model_entry(model_folder))
    yield replica
    replica.close()


@pytest.fixture(scope="session")
def server(replica: Replica) -> Iterator[Server]:
    with serving_on_a_port(local_app({MODEL_NAME: replica})) as server:
        yield server


@pytest.fixture
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
