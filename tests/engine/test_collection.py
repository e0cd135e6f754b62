"""Prompts to trajectories on the engine: what is kept, in what order, and several responses a prompt."""

import pytest

from cllm.decoding.decoder import JacobiDecoder
from cllm.decoding.trajectories import from_table, to_table
from cllm.engine.collection import collect, collection_engine_config, collection_request
from cllm.engine.load import build_engine
from cllm.engine.weights import model_from_transformers
from cllm.recipe import CollectConfig
from cllm.tasks.tokenizer import train_tokenizer
from tests.evaluation.runs import make_prompt
from tests.fakes import EOS, PAD, tiny_model

PROMPTS = [make_prompt(i, tuple(range(2, 4 + i)), (EOS,)) for i in range(5)]
UNFILTERED = {"max_token_repeat": None, "max_sentence_repeat": None, "drop_unfinished": False}


def run(**settings):
    config = CollectConfig(block_size=4, max_new_tokens=14, batch_size=3, **(UNFILTERED | settings))
    engine = build_engine(
        model_from_transformers(tiny_model(3)), collection_engine_config(config, 8), eos_ids=[EOS], pad_id=PAD
    )
    return collect(engine, train_tokenizer(["a b"], 280), PROMPTS, config, seed=5), config


def test_rows_are_those_of_the_slow_decoder_in_the_order_of_the_prompts():
    (rows, dropped), config = run()
    slow = JacobiDecoder(tiny_model(3), block_size=4, refill="block", eos_ids=[EOS], pad_id=PAD, record=True)
    expected = slow.generate([collection_request(prompt, config, 5) for prompt in PROMPTS])
    assert [row.prompt_id for row in rows] == [prompt.prompt_id for prompt in PROMPTS]
    assert [(row.response_ids, row.blocks) for row in rows] == [(r.token_ids, r.trajectory) for r in expected]
    assert not dropped


def test_several_responses_a_prompt_are_the_greedy_one_and_different_draws():
    (single, _), _ = run()
    (rows, dropped), _ = run(samples=4, temperature=1.0)
    assert len(rows) + dropped["repeated"] == 4 * len(PROMPTS)
    assert len(rows) > 2 * len(PROMPTS)
    assert len({(row.prompt_id, row.response_ids) for row in rows}) == len(rows)
    first = {row.prompt_id: row for row in reversed(rows)}
    assert [first[row.prompt_id] for row in single] == single
    assert [row.prompt_id for row in rows] == sorted(row.prompt_id for row in rows)
    assert run(samples=4, temperature=1.0)[0][0] == rows


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_draws_need_a_temperature(temperature):
    with pytest.raises(ValueError, match="temperature"):
        CollectConfig(temperature=temperature)


def test_rows_without_states_keep_all_else():
    (rows, _), _ = run()
    bare = from_table(to_table(rows, {}), states=False)
    assert [(row.prompt_id, row.prompt_ids, row.response_ids, row.finish_reason) for row in bare] == [
        (row.prompt_id, row.prompt_ids, row.response_ids, row.finish_reason) for row in rows
    ]
    assert all(row.blocks == () for row in bare)


def test_without_record_the_responses_are_the_same_and_have_no_states():
    settings = {"samples": 3, "temperature": 1.0}
    (bare, _), _ = run(**settings, record=False)
    (rows, _), _ = run(**settings)
    assert [(row.prompt_id, row.response_ids, row.finish_reason) for row in bare] == [
        (row.prompt_id, row.response_ids, row.finish_reason) for row in rows
    ]
    assert all(row.blocks == () for row in bare)
    assert from_table(to_table(bare, {})) == bare
