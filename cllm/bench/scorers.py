"""What decides a cell's scores and where its answers end, besides prompts and weights, as hashes."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from cllm.bench.prompts import Run
from cllm.config import digest
from cllm.errors import InputError
from cllm.evaluation.subject import SubjectName, checkpoint, prompt_tokenizer
from cllm.models import eos_token_ids, load_generation_config, pad_token_id
from cllm.tasks.prompts import Prompt, tokenizer_hash

_PLACES = {"source", "databases", "workers"}  # settings of a task that say where and how fast, not what
_FILES = frozenset({"database"})  # keys of a context that name a file


def scorer_hash(run: Run, prompts: Sequence[Prompt]) -> str:
    """Of the task's settings and of all that it scores the prompts with: gold answers, tests, the databases' contents.

    Raises:
        InputError: a database is missing.
    """
    settings = run.task.model_dump(mode="json", exclude=_PLACES)
    contents = lru_cache(maxsize=None)(_content_hash)

    def known(context: Mapping[str, str]) -> list[list[str]]:
        return sorted([key, contents(value) if key in _FILES else value] for key, value in context.items())

    return digest([settings, [known(prompt.context) for prompt in prompts]])


def token_hash(run: Run, model: SubjectName) -> str:
    """Of how text becomes the model's tokens, and of the tokens that pad and end."""
    tokenizer = prompt_tokenizer(run.recipe)
    ends = eos_token_ids(load_generation_config(*checkpoint(model, run.recipe)), tokenizer)
    return digest([tokenizer_hash(tokenizer), list(ends), pad_token_id(tokenizer), run.recipe.prompts.template])


def _content_hash(path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: not a readable database ({error.strerror})") from error
