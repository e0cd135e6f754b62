"""Perplexity of a model on a corpus: WikiText-2, Penn Treebank, or any other text.

A window of `context` tokens slides over the text `stride` tokens at a time; of each window the tokens that the one
before did not predict are counted, so every token but the first counts once, with at least context - stride tokens
before it. This is how transformers' documentation does it; papers state perplexities of this kind per token, which
depend on the tokenizer. Per word they do not: all nats over the number of words, and words are what whitespace
separates.

The text is taken as it stands. Nothing is joined with blank lines, lower-cased or detokenised.

Shapes: B windows, L tokens of a window, E hidden size, T predicted tokens of one window, V vocabulary.
"""

import gzip
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import Field, model_validator
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cllm.config import Config
from cllm.errors import InputError
from cllm.evaluation.perplexity import NegativeLogLikelihood

# What the test split is called where a corpus is a folder, and the column of its rows in a parquet file.
_FILES = ("wiki.test.raw", "ptb.test.txt", "test.txt", "test.parquet", "test-00000-of-00001.parquet")
_COLUMNS = ("text", "sentence")
_BATCH_TOKENS = 16_384  # of the windows that one forward reads


class CorpusConfig(Config):
    """A corpus by name, and the window that slides over it."""

    name: str = Field(min_length=1)
    path: str  # a text or parquet file, perhaps with .gz, or a folder with one test split in it
    context: int = Field(2048, ge=2)  # tokens of the window; shorter where the model reads fewer
    stride: int = Field(1024, ge=1)

    @model_validator(mode="after")
    def _windows_overlap(self) -> "CorpusConfig":
        if self.stride >= self.context:
            raise ValueError(f"stride={self.stride} must be less than context={self.context}")
        return self


@dataclass(frozen=True, slots=True)
class CorpusPerplexity:
    """`word` and `token`: exp of the mean nats; None where a broken model gives no finite number."""

    token: float | None
    word: float | None


def read_corpus(path: str) -> str:
    """The text of a corpus. Rows of a parquet file (column `text` or `sentence`) are lines.

    Raises:
        InputError: nothing there, several test splits in one folder, or a file that is damaged or empty.
    """
    file = _file_of(Path(path).expanduser())
    try:
        text = _rows(file) if file.suffix == ".parquet" else _decompressed(file).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, pa.ArrowException) as error:
        raise InputError(f"{file}: not a readable corpus: {str(error).splitlines()[0]}") from error
    if not text.strip():
        raise InputError(f"{file}: the corpus is empty")
    return text


def corpus_perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, *, context: int, stride: int
) -> CorpusPerplexity:
    """Perplexities of a model on a text; the tokenizer adds its beginning token once, if it adds one at all.

    Raises:
        InputError: the text has fewer than two tokens.
    """
    # verbose: a text longer than the model's context is what the windows are for
    tokens = tokenizer(text, verbose=False)["input_ids"]
    if len(tokens) < 2:
        raise InputError(f"a corpus of {len(tokens)} tokens has nothing to predict")
    found = sliding_nll(model, tokens, context=context, stride=stride)
    return CorpusPerplexity(found.perplexity, NegativeLogLikelihood(found.nats, len(text.split())).perplexity)


def sliding_nll(model: PreTrainedModel, tokens: Sequence[int], *, context: int, stride: int) -> NegativeLogLikelihood:
    """Likelihood of all tokens but the first, each counted in the first window that holds it."""
    total = NegativeLogLikelihood(0.0, 0)
    spans = iter(list(windows(len(tokens), context=context, stride=stride)))
    for _, group in groupby(spans, key=lambda window: window[1] - window[0]):
        while batch := list(islice(group, max(1, _BATCH_TOKENS // context))):
            total += _batch_nll(model, tokens, batch)
    return total


def windows(length: int, *, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Start and end of each window, and how many of its last tokens it predicts."""
    predicted = 1  # nothing comes before the first token
    for start in range(0, length, stride):
        end = min(start + context, length)
        yield start, end, end - predicted
        predicted = end
        if end == length:
            return


@torch.inference_mode()
def _batch_nll(
    model: PreTrainedModel, tokens: Sequence[int], batch: Sequence[tuple[int, int, int]]
) -> NegativeLogLikelihood:
    tokens_BL = torch.tensor([tokens[start:end] for start, end, _ in batch], device=model.device)
    hidden_BLE = model.base_model(input_ids=tokens_BL, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    assert head is not None
    nats = 0.0
    # Window by window, because the logits of a whole batch over a large vocabulary would take gigabytes.
    for (_, _, count), tokens_L, hidden_LE in zip(batch, tokens_BL, hidden_BLE, strict=True):
        logits_TV = head(hidden_LE[-count - 1 : -1]).float()
        nats += float(cross_entropy(logits_TV, tokens_L[-count:], reduction="sum"))
    return NegativeLogLikelihood(nats, sum(count for _, _, count in batch))


def _file_of(path: Path) -> Path:
    if not path.is_dir():
        if not path.is_file():
            raise InputError(f"{path}: no such file or folder")
        return path
    found = [path / f"{name}{suffix}" for name in _FILES for suffix in ("", ".gz")]
    found = [file for file in found if file.is_file()]
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or f"none of {', '.join(_FILES)}"
        raise InputError(f"{path}: expected one test split, found {names}; name the file")
    return found[0]


def _decompressed(file: Path) -> bytes:
    data = file.read_bytes()
    return gzip.decompress(data) if file.suffix == ".gz" else data


def _rows(file: Path) -> str:
    table = pq.read_table(file)
    column = next((name for name in _COLUMNS if name in table.column_names), None)
    if column is None:
        raise InputError(f"{file}: no column {' or '.join(_COLUMNS)}; it has {', '.join(table.column_names)}")
    rows = table[column].to_pylist()
    if not all(isinstance(row, str) for row in rows):
        raise InputError(f"{file}: column {column}: row {_first_not_text(rows)} is no text")
    return "".join(row if row.endswith("\n") else f"{row}\n" for row in rows)


def _first_not_text(rows: Sequence[object]) -> int:
    return next(number for number, row in enumerate(rows, start=1) if not isinstance(row, str))
