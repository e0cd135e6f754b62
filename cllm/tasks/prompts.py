"""The one place where examples become token prompts, and the file that holds them."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from cllm.config import digest
from cllm.errors import InputError
from cllm.recipe import PromptConfig
from cllm.tasks.base import FOLLOW_UP, FOLLOW_UP_REFERENCE, QUESTION, Example, Split, Turn
from cllm.tasks.splits import example_id

_T = TypeVar("_T")

SCHEMA_VERSION = "1"
SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("group", pa.string()),
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("reference_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("prompt_text", pa.string(), nullable=False),
        pa.field("reference_text", pa.string(), nullable=False),
        pa.field("context", pa.map_(pa.string(), pa.string()), nullable=False),
        pa.field("origin", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One templated and tokenised example; every later stage reads these and never templates again.

    Attributes:
        prompt_id: `example_id` of the example it was made from.
        prompt_ids: what the model is given, never empty.
        reference_ids: the reference answer with the end-of-sequence token appended.
        prompt_text: the text behind `prompt_ids`, after the template, without an added beginning token.
        reference_text: the reference answer without the end token, as the scorer takes it.
        context: what the scorer needs besides the reference.
    """

    prompt_id: str
    split: Split
    group: str | None
    prompt_ids: tuple[int, ...]
    reference_ids: tuple[int, ...]
    prompt_text: str
    reference_text: str
    context: dict[str, str]
    origin: str


def tokenize(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    config: PromptConfig,
    *,
    task_name: str,
    context: int | None = None,
) -> tuple[list[Prompt], dict[str, int]]:
    """Template and tokenise. Where a split is capped, rows are drawn in the order of their hashed ids.

    A beginning token is added to a plain prompt only if the tokenizer adds one by itself; a chat template writes its
    own. The reference is tokenised apart from the prompt, because decoding starts from exactly `prompt_ids`.

    Args:
        context: tokens that the model can read. A prompt that leaves no room for `max_response_tokens` in it is too
            long; None: `max_prompt_tokens` alone decides.

    Returns:
        The prompts in the order of the examples, and counts: `too_long` rows skipped (of those looked at), and the
        prompts of each split.

    Raises:
        InputError: several turns with the plain template, a tokenizer without chat template or end token, an empty
            prompt, or (with `too_long="error"`) a row over the limits.
    """
    if tokenizer.eos_token_id is None:
        raise InputError(f"tokenizer {tokenizer.name_or_path!r}: has no end-of-sequence token")
    if config.template == "chat" and not tokenizer.chat_template:
        raise InputError(f"prompts.template: tokenizer {tokenizer.name_or_path!r} has no chat template; use plain")
    caps = {"train": config.max_train, "validation": config.max_validation, "test": config.max_test}
    # Ids are hashes, so their order is a random draw that does not depend on the order of rows.
    drawn = sorted((example_id(task_name, example), row, example) for row, example in enumerate(examples))
    counts = Counter({"too_long": 0, "train": 0, "validation": 0, "test": 0})
    made: list[tuple[int, Prompt]] = []
    for prompt_id, row, example in drawn:
        cap = caps[example.split]
        if cap is not None and counts[example.split] >= cap:
            continue
        prompt = _tokenize_one(prompt_id, example, tokenizer, config, context)
        if prompt is None:
            counts["too_long"] += 1
            continue
        counts[example.split] += 1
        made.append((row, prompt))
    return [prompt for _, prompt in sorted(made, key=lambda item: item[0])], dict(counts)


def second_turn(prompt: Prompt, answer: str, tokenizer: PreTrainedTokenizerBase, config: PromptConfig) -> Prompt:
    """The prompt that a conversation goes on with, once the model has answered its first one.

    Args:
        prompt: the first turn; its context holds the question and the one that follows.
        answer: the model's own, as text.

    Raises:
        InputError: the template takes one turn only, or the prompt is longer than `config` allows.
    """
    context = prompt.context
    turns = (Turn("user", context[QUESTION]), Turn("assistant", answer), Turn("user", context[FOLLOW_UP]))
    example = Example(
        turns,
        context.get(FOLLOW_UP_REFERENCE, ""),
        prompt.split,
        prompt.group,
        {key: value for key, value in context.items() if key not in (QUESTION, FOLLOW_UP)},
        prompt.origin,
    )
    strict = config.model_copy(update={"too_long": "error"})
    made = _tokenize_one(second_turn_id(prompt.prompt_id), example, tokenizer, strict)
    assert made is not None
    return made


def second_turn_id(prompt_id: str) -> str:
    """Names the second turn of the conversation that `prompt_id` begins, whatever the answer between them."""
    return digest([prompt_id, "second turn"])


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A stable hash of all that decides how text becomes ids: backend or vocabulary, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        state = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    else:
        state = json.loads(backend.to_str())
        # Left behind by the last call, so not part of what the tokenizer is.
        state["truncation"] = state["padding"] = None
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return digest([state, special, tokenizer.chat_template])


def check_tokenizer(path: str | Path, tokenizer: PreTrainedTokenizerBase, owner: str) -> None:
    """Check that a model's tokenizer is the one that made a prompt file: another one's ids are other words.

    Args:
        path: of the prompt file.
        owner: the model's folder or Hugging Face id, for the message.

    Raises:
        InputError: it is another one, or the file cannot be read.
    """
    found, expected = tokenizer_hash(tokenizer), read_metadata(path)["tokenizer_hash"]
    if found != expected:
        raise InputError(
            f"{owner}: its tokenizer ({found}) is not the one that made {path} ({expected}); prepare again"
        )


def write_prompts(path: str | Path, prompts: Sequence[Prompt], metadata: Mapping[str, str]) -> None:
    """Write one parquet file, whole or not at all.

    `metadata` is kept in the file (see `read_metadata`) and must hold `tokenizer_hash`; `schema_version` is added.
    """
    if "tokenizer_hash" not in metadata:
        raise ValueError("metadata needs tokenizer_hash: token ids mean nothing without it")
    rows = [asdict(prompt) | {"context": sorted(prompt.context.items())} for prompt in prompts]
    schema = SCHEMA.with_metadata({**metadata, "schema_version": SCHEMA_VERSION})
    partial = Path(f"{path}.partial")
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), partial)
    os.replace(partial, path)


def read_prompts(path: str | Path, split: Split | None = None) -> list[Prompt]:
    """The prompts of a file, all or those of one split, in the order written.

    Raises:
        InputError: a missing, damaged or foreign file.
    """
    table = _read(path, pq.read_table)
    _check_schema(path, table.schema)
    rows = (row for row in table.to_pylist() if split is None or row["split"] == split)
    return [
        Prompt(
            **row
            | {
                "prompt_ids": tuple(row["prompt_ids"]),
                "reference_ids": tuple(row["reference_ids"]),
                "context": dict(row["context"]),
            }
        )
        for row in rows
    ]


def draw_prompts(path: str | Path, split: Split, count: int | None = None) -> list[Prompt]:
    """A split's prompts by hashed id, so that the first `count` (None: all) are a random draw.

    Raises:
        InputError: as `read_prompts`.
    """
    return sorted(read_prompts(path, split), key=lambda prompt: prompt.prompt_id)[:count]


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata given to `write_prompts`, and `schema_version`.

    Raises:
        InputError: a missing, damaged or foreign file.
    """
    schema = _read(path, pq.read_schema)
    _check_schema(path, schema)
    return {key.decode(): value.decode() for key, value in schema.metadata.items()}


def _tokenize_one(
    prompt_id: str,
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    config: PromptConfig,
    context: int | None = None,
) -> Prompt | None:
    """The prompt, or None where the row is too long and may be skipped."""
    if config.template == "chat":
        text, prefix = _render_chat(example, tokenizer), []
    else:
        if len(example.turns) != 1:
            raise InputError(f"{example.origin}: the plain template takes one turn, the row has {len(example.turns)}")
        text, prefix = example.turns[0].content, _beginning(tokenizer)
    prompt_ids = (*prefix, *tokenizer.encode(text, add_special_tokens=False))
    reference_ids = (*tokenizer.encode(example.response, add_special_tokens=False), tokenizer.eos_token_id)
    if not prompt_ids:
        raise InputError(f"{example.origin}: the prompt is empty")
    crowded = context is not None and len(prompt_ids) + config.max_response_tokens > context
    if crowded or len(prompt_ids) > config.max_prompt_tokens or len(reference_ids) > config.max_response_tokens:
        if config.too_long == "skip":
            return None
        raise InputError(
            f"{example.origin}: prompt of {len(prompt_ids)} and response of {len(reference_ids)} tokens; the limits "
            f"are prompts.max_prompt_tokens={config.max_prompt_tokens} and "
            f"prompts.max_response_tokens={config.max_response_tokens}"
            + (f"; the model's max_position_embeddings={context} leave less room for the prompt" if crowded else "")
        )
    return Prompt(
        prompt_id=prompt_id,
        split=example.split,
        group=example.group,
        prompt_ids=prompt_ids,
        reference_ids=reference_ids,
        prompt_text=text,
        reference_text=example.response,
        context=dict(example.context),
        origin=example.origin,
    )


def _render_chat(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    messages = [{"role": turn.role, "content": turn.content} for turn in example.turns]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is a program of the model's author and may raise anything
        raise InputError(f"{example.origin}: the chat template refuses the row: {error}") from error


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    start = tokenizer.encode("x")[:1]
    return start if start == [tokenizer.bos_token_id] else []


def _read(path: str | Path, reader: Callable[[str], _T]) -> _T:
    try:
        return reader(str(path))
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: not a readable parquet file: {str(error).splitlines()[0]}") from error


def _check_schema(path: str | Path, schema: pa.Schema) -> None:
    version = (schema.metadata or {}).get(b"schema_version", b"").decode()
    if version != SCHEMA_VERSION or not schema.equals(SCHEMA):
        raise InputError(f"{path}: not a prompt file of schema version {SCHEMA_VERSION} (found {version or 'none'!r})")
