"""A replica that decodes by Jacobi inside vLLM, on the CPU: `python -m tests.serving.interpreted FOLDER`.

In a process of its own, for what `tests.vllm.interpreted` pretends. Prints the chunks of each prompt as JSON.
"""

import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from tests.vllm.interpreted import pretend

GUESSES = 7


def run(folder: Path) -> list[list[dict[str, object]]]:
    from serving.replica import Replica
    from tests.serving.running import chunks_of
    from tests.serving.test_vllm_engine import COUNT, PROMPTS, vllm_entry

    worker = {"worker_cls": "tests.vllm.cpu_worker.CpuJacobiWorker"}
    replica = Replica("jacobi", vllm_entry(folder, "jacobi", guesses=GUESSES, engine_args=worker))
    answers = [chunks_of(replica, prompt, COUNT, ignore_eos=True) for prompt in PROMPTS[:2]]
    replica.check_health()
    return [[asdict(chunk) for chunk in chunks] for chunks in answers]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as fake:
        pretend(fake)
        print(json.dumps(run(Path(sys.argv[1]))), flush=True)
        os._exit(0)  # spares vLLM's orderly but slow end
