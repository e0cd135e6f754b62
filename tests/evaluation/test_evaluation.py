"""The evaluation without a cluster: a run's two models, decoded, timed, and put into one document."""

import dataclasses
import gc
import json
import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from cllm.engine.engine import Engine
from cllm.engine.model import DecoderModel
from cllm.errors import InputError
from cllm.evaluation.decode import Engines, by_length, decode, methods
from cllm.evaluation.live import live_steps
from cllm.evaluation.outputs import Evaluator
from cllm.evaluation.results import Measurements, build_results, find_row, merge_chunks, samples, summarise
from cllm.evaluation.subject import (
    SUBJECTS,
    Subject,
    check_tokenizers,
    load_decoder,
    load_subject,
    prompt_tokenizer,
)
from cllm.evaluation.timing import Timing, time_methods
from cllm.layout import RunLayout
from cllm.recipe import EvaluateConfig, Recipe
from cllm.tasks.prompts import read_prompts
from cllm.tasks.tokenizer import train_tokenizer
from jobs.evaluate import count_of, drawn_prompts, summary
from tests.evaluation.runs import make_prompt, make_run
from tests.fakes import EOS, FAMILIES, PAD, tiny_model

CPU = torch.device("cpu")
CONFIG = EvaluateConfig(max_new_tokens=20, block_size=6, batch_size=2, speed_repeats=3)
PROMPTS = [make_prompt(i, tuple(range(2, 4 + 3 * (i % 3))), (EOS,)) for i in range(5)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def measured(recipe: Recipe) -> Measurements:
    """Chunks in reverse, as a pool may finish them; the scores are made up."""
    prompts = drawn_prompts(recipe)
    evaluator, ways = Evaluator(recipe, prompts, CPU), methods(recipe.evaluate.block_size)
    chunks = [
        found
        for name in SUBJECTS
        for chunk in by_length(prompts, 3)
        for found in (evaluator.rate(name, chunk), *(evaluator.decode(name, method, chunk) for method in ways))
    ]
    outputs, nll = merge_chunks(prompts, reversed(chunks))
    scores = {key: [1.0, 0.0, 1.0, float(key[0] == "cllm")] for key in outputs}
    subjects = {name: load_decoder(name, recipe, CPU) for name in SUBJECTS}
    candidates = {(n, m.name): (s, m) for n, s in subjects.items() for m in ways}
    return Measurements(prompts, outputs, scores, nll, time_methods(candidates, prompts[:2], recipe.evaluate), 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_methods_give_the_tokens_of_ar(family: str) -> None:
    subject = Subject(tiny_model(2, family=family), (EOS,), PAD)
    engines = Engines(subject, CONFIG, PROMPTS, rows=2, record=False)
    ar, *others = ([r.token_ids for r in decode(engines[m], PROMPTS, CONFIG)] for m in methods(CONFIG.block_size))
    assert others == [ar, ar]


def test_results_are_in_the_order_of_the_prompts_and_recorded_on_request() -> None:
    subject, method = Subject(tiny_model(2), (EOS,), PAD), methods(6)[1]
    one_row = Engines(subject, CONFIG, PROMPTS, rows=1, record=False)[method]
    alone = [decode(one_row, [prompt], CONFIG)[0] for prompt in PROMPTS]
    together = decode(Engines(subject, CONFIG, PROMPTS, rows=3, record=True)[method], PROMPTS, CONFIG)
    assert all(result.trajectory for result in together)
    assert [dataclasses.replace(result, trajectory=()) for result in together] == alone


def living() -> Counter[str]:
    """Models and engines in memory, by kind."""
    gc.collect()
    kinds = {LlamaForCausalLM: "transformers", DecoderModel: "decoder", Engine: "engine"}
    return Counter(kinds[kind] for kind in map(type, gc.get_objects()) if kind in kinds)


def test_one_model_and_one_engine_are_held_at_a_time(recipe: Recipe) -> None:
    """Two of either fill the memory of a GPU at 7B."""
    before, prompts = living(), drawn_prompts(recipe)
    evaluator = Evaluator(recipe, prompts, CPU)
    for name in SUBJECTS:
        evaluator.rate(name, prompts)
        assert living() - before == {"transformers": 1}
        for method in methods(recipe.evaluate.block_size):
            evaluator.decode(name, method, prompts)
            assert living() - before == {"decoder": 1, "engine": 1}


def test_an_engine_stays_until_another_method_is_asked_for() -> None:
    engines = Engines(Subject(tiny_model(2), (EOS,), PAD), CONFIG, PROMPTS, rows=2, record=False)
    ar, block, _ = methods(CONFIG.block_size)
    first = weakref.ref(engines[ar])
    assert engines[ar] is first()
    assert engines[block] is not None
    assert first() is None


def test_a_model_loaded_for_engines_decodes_as_the_transformers_one(recipe: Recipe) -> None:
    prompts, config = drawn_prompts(recipe), recipe.evaluate
    whole, alone = load_subject("cllm", recipe, CPU), load_decoder("cllm", recipe, CPU)
    assert (alone.eos_ids, alone.pad_id) == (whole.eos_ids, whole.pad_id)
    for method in methods(config.block_size):
        one, other = (
            decode(Engines(subject, config, prompts, rows=4, record=False)[method], prompts, config)
            for subject in (whole, alone)
        )
        assert one == other


def test_live_steps_are_the_forward_passes_of_both_methods_as_they_come(recipe: Recipe, measured: Measurements) -> None:
    prompt, tokenizer = measured.prompts[0], prompt_tokenizer(recipe)
    steps = live_steps(load_decoder("cllm", recipe, CPU), tokenizer, prompt, recipe.evaluate)
    first = next(steps)  # before the others are decoded
    found = [first, *steps]
    assert [method for method, _ in found] == sorted(method for method, _ in found)  # AR first
    for method in ("ar", "jacobi-sliding"):
        texts = [text for name, text in found if name == method]
        expected = measured.outputs["cllm", method][0]
        assert "".join(texts) == expected.text
        assert len(texts) == len(expected.accepted)


def test_batches_are_sorted_by_length_and_lose_nothing() -> None:
    batches = list(by_length(PROMPTS, 2))
    lengths = [len(prompt.prompt_ids) for batch in batches for prompt in batch]
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert lengths == sorted(lengths)
    assert {prompt.prompt_id for batch in batches for prompt in batch} == {prompt.prompt_id for prompt in PROMPTS}


def test_timing_is_the_median_of_repeats_and_of_ratios_within_a_repeat() -> None:
    """The machine was twice as slow in the second repeat, which no ratio shows."""
    fast, slow = Timing((200.0, 100.0, 220.0)), Timing((100.0, 50.0, 100.0))
    assert fast.tokens_per_s == 200
    assert fast.spread == (100, 220)
    assert fast.speedup_over(slow) == 2


def test_document(recipe: Recipe, measured: Measurements) -> None:
    provenance = {"commit": "abc", "command": ["jobs/evaluate.py", "--set", "output=/home/somebody/run"]}
    document = build_results(recipe, measured, metric="accuracy", provenance=provenance, weights={"cllm": "f00"})
    document = json.loads(json.dumps(document | {"seconds": 1.5}, allow_nan=False))
    assert [(row["model"], row["method"]) for row in document["rows"]] == [
        (name, method) for name in SUBJECTS for method in ("ar", "jacobi-block", "jacobi-sliding")
    ]
    for row in document["rows"]:
        assert row["identical_to_ar"] == 1.0
        assert row["accuracy"] == (0.75 if row["model"] == "cllm" else 0.5)
        assert row["tokens_per_s_spread"][0] <= row["tokens_per_s"] <= row["tokens_per_s_spread"][1]
        forwards = sum(row["step_histogram"].values())
        assert row["tpf"] == pytest.approx(row["mean_response_tokens"] * row["num_prompts"] / forwards)
        assert (row["fast_forwarded"] is not None) == (row["method"] == "jacobi-block")
    block = find_row(document, ("cllm", "jacobi-block"))
    assert block["fast_forwarded"] == pytest.approx(block["tpf"])
    assert find_row(document, ("teacher", "ar"))["speedup_over_ar"] == 1
    assert document["cllm_minus_teacher"]["difference"] == 0.25
    assert document["agreement_with_teacher"] == 0.0
    assert str(recipe.output) not in json.dumps(document)
    assert "somebody" not in json.dumps(document)
    few = summarise(document)
    assert (few["teacher_accuracy"], few["cllm_accuracy"], few["seconds"]) == (0.5, 0.75, 1.5)


def test_samples_hold_both_answers(measured: Measurements) -> None:
    records = samples(measured)
    assert [record["prompt_id"] for record in records] == [prompt.prompt_id for prompt in measured.prompts]
    assert records[0]["reference"] == "SELECT 1"
    assert records[3]["teacher_score"] == 0
    assert records[3]["cllm_score"] == 1
    assert "<|eos|>" not in records[0]["cllm"]


def test_too_few_prompts_are_said_and_none_is_an_error(recipe: Recipe, tmp_path: Path) -> None:
    assert count_of(drawn_prompts(recipe), recipe) == "4 prompts (all there are; 16 wanted)"
    with pytest.raises(InputError, match="no prompts in split test"):
        drawn_prompts(make_run(tmp_path, num_prompts=0))


def test_fewer_are_drawn_by_id(recipe: Recipe) -> None:
    drawn = drawn_prompts(recipe.with_overrides(["evaluate.num_prompts=2"]))
    everything = read_prompts(RunLayout.of(recipe).prompts_file, "test")
    assert drawn == sorted(everything, key=lambda prompt: prompt.prompt_id)[:2]


def test_foreign_tokenizer_is_refused(tmp_path: Path) -> None:
    recipe = make_run(tmp_path)
    check_tokenizers(recipe)
    layout = RunLayout.of(recipe)
    train_tokenizer(["another text"], 280).save_pretrained(layout.student)
    with pytest.raises(
        InputError, match=rf"^{layout.student}: its tokenizer .* {layout.prompts_file} .*prepare again$"
    ):
        check_tokenizers(recipe)


def test_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    recipe = make_run(tmp_path)
    tokenizer = prompt_tokenizer(recipe)
    tokenizer.add_tokens([f"<{number}>" for number in range(50)])
    tokenizer.save_pretrained(RunLayout.of(recipe).tokenizer)
    with pytest.raises(InputError, match="does not belong to the model"):
        load_subject("cllm", recipe, CPU)


def test_summary_needs_a_finished_evaluation(recipe: Recipe) -> None:
    with pytest.raises(InputError, match="evaluation"):
        summary(recipe)
