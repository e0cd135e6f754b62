"""Our tokenizer spells any text back, and survives the disk."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cllm.errors import InputError
from cllm.tasks.prompts import tokenizer_hash
from cllm.tasks.tokenizer import BOS, EOS, PAD, train_tokenizer

TEXTS = [f"SELECT name FROM singer WHERE age > {i} AND city = 'Genève'" for i in range(100, 140)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 300)


def test_size_and_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 300
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == (PAD, BOS, EOS)
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


@given(text=st.text())
def test_any_text_comes_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert tokenizer.decode(ids) == text.encode("utf-8", "replace").decode()


def test_digits_are_tokens_of_their_own(tokenizer: PreTrainedTokenizerFast) -> None:
    pieces = [tokenizer.decode([i]).strip() for i in tokenizer.encode("age > 12345", add_special_tokens=False)]
    assert pieces[-5:] == ["1", "2", "3", "4", "5"]


def test_frequent_words_are_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer.encode(" WHERE", add_special_tokens=False)) == 1


def test_it_begins_with_bos_by_itself(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.encode("x") == [tokenizer.bos_token_id, *tokenizer.encode("x", add_special_tokens=False)]


def test_training_is_deterministic_whatever_the_order() -> None:
    assert tokenizer_hash(train_tokenizer(TEXTS, 290)) == tokenizer_hash(train_tokenizer(reversed(TEXTS), 290))


def test_it_survives_the_disk(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = " SELECT  12 é\n"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.decode(loaded.encode(text), skip_special_tokens=True) == text
    assert (loaded.pad_token_id, loaded.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert tokenizer_hash(loaded) == tokenizer_hash(tokenizer)


def test_a_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(InputError, match="vocab_size: must be at least 259, got 258"):
        train_tokenizer(TEXTS, 258)
