"""CodeSearchNet-Python: a function from its description."""

import ast
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from cllm.config import Config, digest
from cllm.errors import InputError
from cllm.tasks.base import SPLITS, Example, Split, Turn
from cllm.tasks.source import Row, has_split, read_rows, require_any

# The same two fields under the names of the Hugging Face data, of the original release, and of CodeXGLUE's queries.
_DESCRIPTION = ("func_documentation_string", "docstring", "doc")
_CODE = ("whole_func_string", "code")


class CodeSearchNetConfig(Config):
    """Rows with a description (`func_documentation_string`, `docstring` or `doc`) and a function (`whole_func_string`
    or `code`)."""

    name: Literal["codesearchnet"] = "codesearchnet"
    source: str  # a file, a folder with files train etc., or "code-search-net/code_search_net:python"
    test_fraction: float = Field(0.1, gt=0, lt=1)  # of the functions, by hash, where the source is one file
    matched_only: bool = True  # leave out rows with `label` 0: the description is of another function


class CodeSearchNet:
    """See `cllm.tasks.base.Task`. The group is the function, so a function never stands in two splits."""

    name = "codesearchnet"
    metric = "agreement"

    def __init__(self, config: CodeSearchNetConfig) -> None:
        self._config = config
        self.counts = Counter[str]()

    def examples(self) -> Iterator[Example]:
        """All splits of the source; rows left out for their label are counted.

        Raises:
            InputError: missing or malformed data.
        """
        self.counts.clear()
        for origin, row, split in self._rows():
            if self._config.matched_only and row.get("label", 1) in (0, "0"):
                self.counts["label_0"] += 1
                continue
            description = require_any(row, _DESCRIPTION, str, origin).strip()
            code = require_any(row, _CODE, str, origin).strip()
            group = digest(_fold(code))
            yield Example(
                turns=(Turn("user", f"Write a Python function for this description:\n{description}\n\nFunction:\n"),),
                response=code,
                split=split or self._draw(group),
                group=group,
                origin=origin,
            )

    def score(
        self, responses: Sequence[str], references: Sequence[str], contexts: Sequence[Mapping[str, str]]
    ) -> list[float]:
        """1 where response and reference are the same program (`same_program`). No tests exist to run, so a function
        that does the same in other words scores 0."""
        return [float(same_program(given, wanted)) for given, wanted in zip(responses, references, strict=True)]

    def _rows(self) -> Iterator[tuple[str, Row, Split | None]]:
        """The rows with the split that the source gives them; None where the source is one file."""
        source = self._config.source
        if Path(source).expanduser().is_file():
            yield from ((origin, row, None) for origin, row in read_rows(source))
            return
        splits = [split for split in SPLITS if has_split(source, split)]
        if not splits:
            raise InputError(f"task.source: {source} has none of the splits {', '.join(SPLITS)}")
        for split in splits:
            yield from ((origin, row, split) for origin, row in read_rows(source, split))

    def _draw(self, group: str) -> Split:
        return "test" if int(group, 16) / 16**16 < self._config.test_fraction else "train"


def same_program(given: str, wanted: str) -> bool:
    """Whether two sources have the same syntax tree, so that layout and comments do not count; names and docstrings do.

    Where one of them does not parse (Python 2, line breaks lost), whether they are equal up to whitespace.
    """
    trees = _tree(given), _tree(wanted)
    if None in trees:
        return _fold(given) == _fold(wanted)
    return trees[0] == trees[1]


def _tree(code: str) -> str | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes, which are the code's business
            return ast.dump(ast.parse(code.strip()))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _fold(code: str) -> str:
    """The same for a function whose line breaks were lost as for the original."""
    return " ".join(code.split())
