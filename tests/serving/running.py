"""Models, applications and servers for the tests of serving."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI
from transformers import LlamaConfig, LlamaForCausalLM

from cllm.decoding.records import SamplingParams
from cllm.models import save_model
from cllm.tasks.tokenizer import train_tokenizer
from serving.app import create_app
from serving.config import CllmModel, Limits
from serving.keys import KeyRing
from serving.messages import Chunk, GenerateRequest, Prompt, Responder
from serving.replica import Replica
from serving.service import Service

MODEL_NAME = "tiny"
CONTEXT = 160
PATIENCE_S = 60
OPTIONS = {"window": 8, "max_rows": 8, "max_tokens": CONTEXT, "block_tokens": 8}
TEXTS = ("How many singers are there?", "SELECT count(*) FROM singer", "grün und blau, naïve café", "名前は何ですか")
DEFECT = "divide"  # a message that the template below fails at
TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'divide' %}{{ 1 // 0 }}{% endif %}"
    "{% if m.role == 'system' and not loop.first %}{{ raise_exception('the system message comes first') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def save_tiny_model(folder: Path, *, template: str | None = TEMPLATE, hidden: int = 32) -> Path:
    """Logits are spread widely, so that rounding never decides; hardly ever ends by itself."""
    tokenizer = train_tokenizer(TEXTS * 4, 300)
    tokenizer.chat_template = template
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    save_model(folder, LlamaForCausalLM(config), tokenizer)
    return folder


def model_entry(folder: Path, **settings: object) -> CllmModel:
    data = {"engine": "cllm", "path": str(folder), "options": OPTIONS, "cpus": 0.1}
    return CllmModel.model_validate(data | settings)


def chunks_of(replica: Replica, prompt: Prompt, count: int, **sampling: object) -> list[Chunk]:
    """What the replica answers step by step, asked without HTTP."""
    params = SamplingParams(**sampling)  # type: ignore[arg-type]
    request = GenerateRequest("test", prompt, count, params, time.time(), delivery="steps")

    async def run() -> list[Chunk]:
        return [chunk async for chunk in replica.generate(request)]

    return asyncio.run(run())


def text_of(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def local_app(
    backends: Mapping[str, Responder], *, limits: Limits | None = None, keys: KeyRing | None = None
) -> FastAPI:
    """The application in front of backends of this process."""
    limits = limits or Limits(body_bytes=100_000, choices=8)
    return create_app(Service(backends, limits, retry_after_s=1), limits, keys)


@dataclass(frozen=True)
class Server:
    host: str
    port: int

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


@contextmanager
def serving_on_a_port(app: FastAPI) -> Iterator[Server]:
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    yield Server(*listening.getsockname())
    server.should_exit = True
    thread.join()
    listening.close()


def wait_until(holds: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline, "it never came to hold"
        time.sleep(0.01)
