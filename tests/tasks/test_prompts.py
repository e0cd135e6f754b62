"""Examples become token prompts once, and the file gives back what was written."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from cllm.errors import InputError
from cllm.recipe import PromptConfig
from cllm.tasks.base import Example, Turn
from cllm.tasks.prompts import Prompt, read_metadata, read_prompts, tokenize, tokenizer_hash, write_prompts
from cllm.tasks.splits import example_id
from cllm.tasks.tokenizer import train_tokenizer

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["one two three four"] * 4, 270)


def examples(count: int) -> list[Example]:
    return [Example((Turn("user", f"one {i}"),), f"two {i}", "train", origin=f"f:{i}") for i in range(count)]


def make(
    rows: list[Example], tokenizer: PreTrainedTokenizerFast, **options: object
) -> tuple[list[Prompt], dict[str, int]]:
    return tokenize(rows, tokenizer, PromptConfig.model_validate(options), task_name="t")


def test_a_plain_prompt_is_the_content_with_the_tokenizers_own_beginning(tokenizer: PreTrainedTokenizerFast) -> None:
    row = Example((Turn("user", " one\n"),), "two", "test", "g", {"gold": "2"}, "f:1")
    ((prompt,), counts) = make([row], tokenizer)
    assert prompt.prompt_ids == tuple(tokenizer.encode(" one\n"))
    assert prompt.prompt_ids[0] == tokenizer.bos_token_id
    assert prompt.reference_ids == (*tokenizer.encode("two", add_special_tokens=False), tokenizer.eos_token_id)
    assert (prompt.prompt_text, prompt.reference_text) == (" one\n", "two")
    assert (prompt.prompt_id, prompt.split, prompt.group) == (example_id("t", row), "test", "g")
    assert (prompt.context, prompt.origin) == ({"gold": "2"}, "f:1")
    assert counts == {"too_long": 0, "train": 0, "validation": 0, "test": 1}


def test_no_beginning_is_added_to_a_tokenizer_without_one(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.backend_tokenizer.post_processor = None
    ((prompt,), _) = make(examples(1), tokenizer)
    assert prompt.prompt_ids == tuple(tokenizer.encode("one 0", add_special_tokens=False))


def test_a_chat_prompt_is_what_the_template_writes(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "<|bos|>" + CHAT
    row = Example((Turn("system", "one"), Turn("user", "two")), "three", "train")
    ((prompt,), _) = make([row], tokenizer, template="chat")
    assert prompt.prompt_text == "<|bos|><system>one<user>two<answer>"
    assert prompt.prompt_ids == tuple(tokenizer.encode(prompt.prompt_text, add_special_tokens=False))
    assert prompt.prompt_ids.count(tokenizer.bos_token_id) == 1


def test_templates_that_do_not_fit_are_named(tokenizer: PreTrainedTokenizerFast) -> None:
    two_turns = Example((Turn("system", "a"), Turn("user", "b")), "c", "train", origin="f:7")
    with pytest.raises(InputError, match="f:7: the plain template takes one turn, the row has 2"):
        make([two_turns], tokenizer)
    with pytest.raises(InputError, match=r"prompts\.template: tokenizer .* has no chat template"):
        make([two_turns], tokenizer, template="chat")
    tokenizer.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(InputError, match="f:7: the chat template refuses the row: no system"):
        make([two_turns], tokenizer, template="chat")


def test_a_tokenizer_without_end_token_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="has no end-of-sequence token"):
        make(examples(1), tokenizer)


def test_an_empty_prompt_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(InputError, match="f:3: the prompt is empty"):
        make([Example((Turn("user", ""),), "a", "train", origin="f:3")], tokenizer)


def test_rows_at_the_limits_stay_and_longer_ones_go(tokenizer: PreTrainedTokenizerFast) -> None:
    ((prompt,), _) = make(examples(1), tokenizer)
    limits = {"max_prompt_tokens": len(prompt.prompt_ids), "max_response_tokens": len(prompt.reference_ids)}
    assert make(examples(1), tokenizer, **limits)[1]["too_long"] == 0
    for key, limit in limits.items():
        shorter = limits | {key: limit - 1}
        assert make(examples(1), tokenizer, **shorter) == ([], {"too_long": 1, "train": 0, "validation": 0, "test": 0})
        with pytest.raises(InputError, match=f"f:0: prompt of {len(prompt.prompt_ids)} and response of") as caught:
            make(examples(1), tokenizer, too_long="error", **shorter)
        assert f"{key}={limit - 1}" in str(caught.value)


def test_caps_draw_the_same_rows_in_any_order(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = examples(30)
    drawn, counts = make(rows, tokenizer, max_train=7)
    again, _ = make(rows[::-1], tokenizer, max_train=7)
    assert counts["train"] == len(drawn) == 7
    assert {p.prompt_id for p in drawn} == {p.prompt_id for p in again}
    assert [p.origin for p in drawn] == [row.origin for row in rows if row.origin in {p.origin for p in drawn}]
    assert [p.origin for p in drawn] != [row.origin for row in rows[:7]]
    more, _ = make(rows, tokenizer, max_train=12)
    assert {p.prompt_id for p in drawn} < {p.prompt_id for p in more}


def test_caps_are_of_each_split_and_count_what_fits(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = examples(10)
    long = [replace(row, turns=(Turn("user", f"{'one ' * 50}{i}"),)) for i, row in enumerate(rows)]
    test = [replace(row, split="test") for row in rows]
    _, counts = make([*long, *rows, *test], tokenizer, max_train=10, max_prompt_tokens=20, max_test=0)
    assert (counts["train"], counts["test"]) == (10, 0)


def test_the_file_gives_back_what_was_written(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [
        replace(row, split="test" if i % 2 else "train", context={"b": "1", "a": ""})
        for i, row in enumerate(examples(4))
    ]
    prompts, _ = make([*rows[:3], replace(rows[3], group="g", context={})], tokenizer)
    path = tmp_path / "prompts.parquet"
    write_prompts(path, prompts, {"tokenizer_hash": "abc", "task": "t"})
    assert read_prompts(path) == prompts
    assert read_prompts(path, "test") == [p for p in prompts if p.split == "test"]
    assert read_metadata(path) == {"tokenizer_hash": "abc", "task": "t", "schema_version": "1"}
    assert list(tmp_path.iterdir()) == [path]


def test_no_prompts_are_a_file_too(tmp_path: Path) -> None:
    write_prompts(tmp_path / "p", [], {"tokenizer_hash": "abc"})
    assert read_prompts(tmp_path / "p") == []


def test_a_file_without_tokenizer_hash_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokenizer_hash"):
        write_prompts(tmp_path / "p", [], {})


def test_damaged_and_foreign_files_are_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "prompts.parquet"
    write_prompts(path, make(examples(3), tokenizer)[0], {"tokenizer_hash": "abc"})
    whole = path.read_bytes()
    for size in (0, 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        for read in (read_prompts, read_metadata):
            with pytest.raises(InputError, match=r"prompts\.parquet: not a readable parquet file"):
                read(path)
    pq.write_table(pa.table({"prompt_id": ["x"]}), path)
    with pytest.raises(InputError, match=r"prompts\.parquet: not a prompt file of schema version 1 \(found 'none'\)"):
        read_prompts(path)
    with pytest.raises(InputError, match=r"gone\.parquet: not a readable"):
        read_prompts(tmp_path / "gone.parquet")


def test_the_tokenizer_hash_is_of_what_it_does(tokenizer: PreTrainedTokenizerFast) -> None:
    before = tokenizer_hash(tokenizer)
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=2)
    assert tokenizer_hash(tokenizer) == before
    tokenizer.chat_template = CHAT
    with_chat = tokenizer_hash(tokenizer)
    tokenizer.eos_token = "<|pad|>"
    other_end = tokenizer_hash(tokenizer)
    assert len({before, with_chat, other_end, tokenizer_hash(train_tokenizer(["five"] * 9, 262))}) == 4
