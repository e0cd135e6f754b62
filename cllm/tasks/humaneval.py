"""HumanEval: pass@1 of completed Python functions, run in `cllm.tasks.sandbox`."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from pydantic import Field

from cllm.config import Config
from cllm.tasks.base import Example, Turn
from cllm.tasks.sandbox import SandboxLimits, run_programs
from cllm.tasks.source import read_rows, require

# A fence opens a block if the response begins with it, or if another one closes it; else it is the end of the body.
_FENCE = r"```[\w+-]*[ \t]*\n"
_FENCED = re.compile(rf"\A\s*{_FENCE}(.*?)(?:```|\Z)|^{_FENCE}(.*?)```", re.DOTALL | re.MULTILINE)
# What begins a new statement of the module behind the body: the stop sequences of the HumanEval paper.
_NEXT_STATEMENT = re.compile(r"^(?:class|def|if|print)\b|^[#@]|^```", re.MULTILINE)


class HumanEvalConfig(Config):
    """Rows with `task_id`, `prompt`, `entry_point`, `canonical_solution` and `test`. All are test rows."""

    name: Literal["humaneval"] = "humaneval"
    source: str  # a file, a folder with HumanEval.jsonl or a test file, or "openai/openai_humaneval"
    workers: int = Field(2, ge=1)  # programs run at a time
    seconds: float = Field(5.0, gt=0)  # wall time of one program
    memory_mib: int = Field(1024, ge=64)  # address space of one program


class HumanEval:
    """See `cllm.tasks.base.Task`."""

    name = "humaneval"
    metric = "pass@1"

    def __init__(self, config: HumanEvalConfig) -> None:
        self._config = config
        self.counts = Counter[str]()

    def examples(self) -> Iterator[Example]:
        """The problems, all in `test`, for they are too few to train on. Raises InputError on bad data."""
        for origin, row in read_rows(self._config.source, "test", names=("HumanEval",)):
            yield Example(
                turns=(Turn("user", require(row, "prompt", str, origin)),),
                response=require(row, "canonical_solution", str, origin),
                split="test",
                group=require(row, "task_id", str, origin),
                context={key: require(row, key, str, origin) for key in ("prompt", "test", "entry_point")},
                origin=origin,
            )

    def score(
        self, responses: Sequence[str], references: Sequence[str], contexts: Sequence[Mapping[str, str]]
    ) -> list[float]:
        """1 where the completed function passes its tests within the limits.

        Raises:
            RuntimeError: the sandbox itself does not work; a response never raises.
        """
        limits = SandboxLimits(seconds=self._config.seconds, memory_bytes=self._config.memory_mib << 20)
        programs = [
            # Three sources, so that no response can run on into the tests (by an open string, for example).
            (
                complete(context["prompt"], response, context["entry_point"]),
                context["test"],
                f"check({context['entry_point']})",
            )
            for response, context in zip(responses, contexts, strict=True)
        ]
        outcomes = run_programs(programs, limits, workers=self._config.workers)
        return [float(outcome.status == "passed") for outcome in outcomes]


def complete(prompt: str, response: str, entry_point: str) -> str:
    """The program that a response means.

    The first fenced block counts where there is one, as chat models write. A response that defines the function itself
    stands behind the prompt, whose imports and helpers it may use; any other is the function's body, up to the first
    statement behind it.
    """
    fenced = _FENCED.search(response)
    code = (fenced.group(1) or fenced.group(2) or "") if fenced else response
    if re.search(rf"^(?:async )?def {re.escape(entry_point)}\b", code, re.MULTILINE):
        return f"{prompt}\n    pass\n\n{code}"
    end = _NEXT_STATEMENT.search(code)
    return prompt + (code[: end.start()] if end else code)
