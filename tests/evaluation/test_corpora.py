"""Perplexity of a corpus against transformers' own loop; every token but the first counts once; files of all kinds."""

import gzip
import hashlib
import math
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from cllm.errors import InputError
from cllm.evaluation.corpora import CorpusConfig, corpus_perplexity, read_corpus, sliding_nll, windows
from cllm.tasks.tokenizer import train_tokenizer
from tests.fakes import FAMILIES, tiny_model

TEXT = " = Title = \n\n The cat sat , and the dog , named Rex , ran .\n" * 3


def reference_loop(model: PreTrainedModel, tokens: list[int], context: int, stride: int) -> tuple[float, int]:
    """Perplexity of fixed-length models as transformers' documentation computes it; nats and tokens."""
    nats, count, previous_end = 0.0, 0, 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + context, len(tokens))
        ids = torch.tensor([tokens[begin:end]])
        labels = ids.clone()
        labels[:, : -(end - previous_end)] = -100
        valid = int((labels[:, 1:] != -100).sum())
        with torch.inference_mode():
            nats += float(model(input_ids=ids, labels=labels).loss) * valid
        count += valid
        previous_end = end
        if end == len(tokens):
            break
    return nats, count


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("context", "stride", "length"), [(16, 8, 100), (16, 15, 97), (32, 1, 40), (64, 32, 20)])
def test_equals_the_loop_of_transformers(family: str, context: int, stride: int, length: int) -> None:
    model = tiny_model(2, family=family)
    tokens = torch.randint(2, 24, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    nats, count = reference_loop(model, tokens, context, stride)
    found = sliding_nll(model, tokens, context=context, stride=stride)
    assert found.num_tokens == count == length - 1
    assert found.perplexity == pytest.approx(math.exp(nats / count), rel=1e-4)


@given(length=st.integers(2, 200), context=st.integers(2, 50), data=st.data())
def test_every_token_but_the_first_counts_once_and_has_a_context(
    length: int, context: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, context - 1))
    predicted: list[int] = []
    for start, end, count in windows(length, context=context, stride=stride):
        assert end - start <= context
        predicted += range(end - count, end)
        assert end - count - start >= (1 if start == 0 else context - stride)
    assert predicted == list(range(1, length))


def test_per_token_and_per_word_are_the_same_nats() -> None:
    tokenizer = train_tokenizer([TEXT], 300)
    model = tiny_model(3, vocab_size=300)
    found = corpus_perplexity(model, tokenizer, TEXT, context=64, stride=32)
    tokens = tokenizer(TEXT)["input_ids"]
    assert tokens[0] == tokenizer.bos_token_id
    assert found.token is not None
    assert found.word is not None
    assert math.log(found.token) * (len(tokens) - 1) == pytest.approx(math.log(found.word) * len(TEXT.split()))


def test_nothing_to_predict() -> None:
    tokenizer = train_tokenizer([TEXT], 300)
    with pytest.raises(InputError, match="nothing to predict"):
        corpus_perplexity(tiny_model(vocab_size=300), tokenizer, "", context=8, stride=4)


def test_files_and_folders_hold_the_same_text(tmp_path: Path) -> None:
    lines = TEXT.splitlines(keepends=True)
    (tmp_path / "plain.txt").write_text(TEXT)
    (tmp_path / "packed.raw.gz").write_bytes(gzip.compress(TEXT.encode()))
    pq.write_table(pa.table({"text": lines}), tmp_path / "kept.parquet")
    pq.write_table(pa.table({"sentence": [line[:-1] for line in lines]}), tmp_path / "stripped.parquet")
    folder = tmp_path / "wikitext2"
    folder.mkdir()
    (folder / "wiki.test.raw.gz").write_bytes(gzip.compress(TEXT.encode()))
    (folder / "wiki.valid.raw").write_text("another split")
    for path in tmp_path.iterdir():
        assert read_corpus(str(path)) == TEXT


@pytest.mark.parametrize(
    ("files", "asked", "message"),
    [
        ({}, "absent.txt", "no such file or folder"),
        ({"valid.txt": b"x"}, "", "expected one test split, found none of wiki.test.raw"),
        ({"test.txt": b"x", "ptb.test.txt": b"y"}, "", "found ptb.test.txt, test.txt; name the file"),
        ({"test.txt": b" \n"}, "", "the corpus is empty"),
        ({"a.txt": b"\xff"}, "a.txt", "not a readable corpus"),
        ({"a.txt.gz": b"no gzip"}, "a.txt.gz", "not a readable corpus"),
        ({"a.parquet": b"no parquet"}, "a.parquet", "not a readable corpus"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, files: dict[str, bytes], asked: str, message: str) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message) as error:
        read_corpus(str(tmp_path / asked))
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_tables_are_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"words": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet: no column text or sentence; it has words"):
        read_corpus(str(tmp_path / "a.parquet"))
    pq.write_table(pa.table({"text": ["x", None]}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"b\.parquet: column text: row 2 is no text"):
        read_corpus(str(tmp_path / "b.parquet"))


def test_windows_must_overlap() -> None:
    with pytest.raises(InputError, match="stride=8 must be less than context=8"):
        CorpusConfig.from_data({"name": "x", "path": "y", "context": 8, "stride": 8}, where="test")


@pytest.mark.skipif("CLLM_DATA" not in os.environ, reason="CLLM_DATA names no folder with wikitext2/")
def test_wikitext_is_the_published_file() -> None:
    text = read_corpus(str(Path(os.environ["CLLM_DATA"]) / "wikitext2"))
    digest = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
    assert hashlib.sha256(text.encode()).hexdigest() == digest
