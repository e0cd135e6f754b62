"""Lookahead decoding in the engine: AR's tokens, the twin's forwards, and a cache as if tokens had come one by one.

Shapes: H heads, L tokens, D head size.
"""

import importlib.util
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.decoding.lookahead import LookaheadDecoder
from cllm.decoding.records import DecodeRequest, SamplingParams
from cllm.decoding.reference import autoregressive
from cllm.engine.config import EngineConfig, LookaheadConfig
from cllm.engine.engine import Engine
from cllm.errors import InputError
from cllm.tasks.tokenizer import train_tokenizer
from tests.engine.making import check_books, make_engine, requests
from tests.fakes import EOS, FAMILIES, PAD, tiny_model

WIDE = {"window": 4, "ngram": 4, "candidates": 4}


def repeated(model, count, length=10, **sampling):
    """Requests whose prompt holds AR's own first tokens, so that candidates hold and runs are long."""
    made = []
    for number in range(count):
        prompt = (3 + number, 4, 5 + number % 3)
        params = SamplingParams(seed=number, **sampling)
        answer = autoregressive(model, DecodeRequest(prompt, length, params), [])
        made.append(DecodeRequest((*answer, *prompt, *answer, *prompt), 3 * length, params))
    return made


def num_blocks_for(requests, overhang, spare):
    longest = max(len(request.prompt_ids) + request.max_new_tokens for request in requests)
    return 1 + -(-(longest + overhang) // 4) + spare


lookaheads = st.builds(
    LookaheadConfig,
    window=st.integers(1, 6),
    ngram=st.integers(2, 5),
    candidates=st.integers(1, 4),
    pool_text=st.booleans(),
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    model_seed=st.integers(0, 7),
    batch=requests(),
    lookahead=lookaheads,
    guess=st.sampled_from(["prompt", "pad"]),
    max_rows=st.integers(1, 4),
    spare_blocks=st.integers(0, 20),
)
def test_any_batch_equals_autoregressive(model_seed, batch, lookahead, guess, max_rows, spare_blocks):
    model = tiny_model(model_seed)
    engine = make_engine(
        model,
        num_blocks=num_blocks_for(batch, lookahead.branches.num_inputs - 1, spare_blocks),
        lookahead=lookahead,
        guess=guess,
        max_rows=max_rows,
    )
    results = engine.generate(batch)
    check_books(engine)
    for request, result in zip(batch, results, strict=True):
        expected = autoregressive(model, request, [EOS])
        assert list(result.token_ids) == expected
        assert sum(result.accepted) == len(expected)
        assert all(1 <= accepted <= lookahead.ngram for accepted in result.accepted)
        assert result.finish_reason == ("stop" if expected[-1] == EOS else "length")


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    model_seed=st.integers(0, 7),
    prompts=st.lists(st.lists(st.integers(2, 23), min_size=1, max_size=6), min_size=1, max_size=4),
    ngram=st.integers(2, 5),
    limit=st.integers(1, 24),
    end=st.integers(0, 23),
    temperature=st.sampled_from([0.0, 0.4]),
)
def test_long_runs_end_where_autoregression_ends(model_seed, prompts, ngram, limit, end, temperature):
    """Every pool knows AR's answer, so limits and stop tokens fall inside of what is confirmed."""
    model = tiny_model(model_seed)
    engine = make_engine(model, lookahead={"window": 2, "ngram": ngram, "candidates": 4})
    draw = SamplingParams(temperature=temperature, seed=5)
    expected, sequences = [], []
    for prompt in prompts:
        request = DecodeRequest(tuple(prompt), limit, draw)
        answer = autoregressive(model, replace(request, max_new_tokens=24), [])
        expected.append(autoregressive(model, request, [answer[end]]))
        sampling = replace(draw, ignore_eos=True, stop_token_ids=(answer[end],))
        key = engine.add(replace(request, sampling=sampling))
        for count in (24, ngram - 1):  # the first n-gram again, so that it is the latest
            engine.mode._states[key].pool.add([prompt[-1], *answer[:count]])
        sequences.append(engine.sequence(key))
    while engine.num_unfinished:
        engine.step()
    check_books(engine)
    results = [sequence.result() for sequence in sequences]
    assert [list(result.token_ids) for result in results] == expected
    assert all(result.accepted[0] == min(ngram, len(result.token_ids)) for result in results)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.5, "top_k": 6}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("sizes", [{"window": 6, "ngram": 3, "candidates": 2}, WIDE | {"pool_text": False}])
def test_forwards_are_those_of_the_twin(family, sampling, sizes):
    """Each forward commits what the same forward of the slow decoder commits: columns and pools are the same, too."""
    model = tiny_model(3, family=family)
    batch = repeated(model, 6, **sampling)
    slow = LookaheadDecoder(model, **sizes, eos_ids=[EOS], pad_id=PAD).generate(batch)
    fast = make_engine(model, lookahead=sizes, guess="prompt").generate(batch)
    assert [result.accepted for result in fast] == [result.accepted for result in slow]
    assert [result.token_ids for result in fast] == [result.token_ids for result in slow]
    if sizes.get("pool_text", True):
        assert max(max(result.accepted) for result in fast) > 1


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(), reason="needs triton's interpreter"
)
@pytest.mark.parametrize("batch", [1, 2])
def test_our_kernel_in_the_engine(batch):
    from cllm.engine.triton_attention import TritonAttention

    model, sizes = tiny_model(3, layers=1), {"window": 2, "ngram": 3, "candidates": 2}
    asked = repeated(model, batch, length=4)
    attention = TritonAttention(torch.device("cpu"), num_programs=1)
    results = make_engine(model, lookahead=sizes, attention=attention).generate(asked)
    assert [list(result.token_ids) for result in results] == [autoregressive(model, r, [EOS]) for r in asked]
    assert max(max(result.accepted) for result in results) > 1


@torch.inference_mode()
def check_cache(engine: Engine, model) -> int:
    """Keys and values of all stored tokens are those of one plain forward over them; how many rows were looked at."""
    rows = [row for row in engine.scheduler.running if row.num_stored > 0]
    for row in rows:
        places = [engine.runner._place(row, index) for index in range(row.num_stored)]
        tokens_1L = torch.tensor([row.tokens[: row.num_stored]])
        plain = model(input_ids=tokens_1L, use_cache=True).past_key_values
        for layer, pages in zip(plain.layers, engine.runner.cache, strict=True):
            for expected_HLD, found in ((layer.keys[0], pages.keys_NSKD), (layer.values[0], pages.values_NSKD)):
                found_HLD = found.flatten(0, 1)[places].transpose(0, 1)
                torch.testing.assert_close(found_HLD, expected_HLD, rtol=1e-4, atol=1e-4)
    return len(rows)


@pytest.mark.parametrize("seed", range(6))
def test_the_cache_is_that_of_plain_forwards_whatever_happens(seed):
    """Random requests, aborts and steps in a cache that is too small for all of them."""
    rng, model = random.Random(seed), tiny_model(seed)
    sizes = {"window": rng.randint(1, 5), "ngram": rng.randint(3, 5), "candidates": rng.randint(2, 5)}
    overhang = LookaheadConfig(**sizes).branches.num_inputs - 1
    pool = repeated(model, 8) + repeated(model, 4, temperature=0.7)
    engine = make_engine(model, num_blocks=num_blocks_for(pool, overhang, 12), lookahead=sizes, prefill_tokens=24)
    answers: dict[int, tuple[DecodeRequest, list[int]]] = {}
    live: set[int] = set()
    checked = moved = admissions = 0
    for _ in range(90):
        if rng.random() < 0.3 and len(live) < 6:
            request = rng.choice(pool)
            key = engine.add(request)
            answers[key] = request, []
            live.add(key)
        if live and rng.random() < 0.04:
            key = rng.choice(sorted(live))
            engine.abort(key)
            live.remove(key)
            del answers[key]
        for commit in engine.step():
            answers[commit.row][1].extend(commit.token_ids)
            moved += len(commit.token_ids) > 1
            if commit.finish_reason is not None:
                live.remove(commit.row)
        admissions = max([admissions, *(row.admissions for row in engine.scheduler.running)])
        engine.scheduler.check()
        checked += check_cache(engine, model)
    while engine.num_unfinished:
        for commit in engine.step():
            answers[commit.row][1].extend(commit.token_ids)
    check_books(engine)
    for request, tokens in answers.values():
        assert tokens == autoregressive(model, request, [EOS])
    assert checked > 100
    assert moved > 20
    assert admissions > 1, "no row was ever preempted"


def test_streams_and_aborts():
    model = tiny_model(4)
    engine = make_engine(model, lookahead=WIDE)
    kept, dropped = DecodeRequest((3, 4), 30), DecodeRequest((5, 6, 7), 60, SamplingParams(ignore_eos=True))
    key, other = engine.add(kept), engine.add(dropped)
    tokens = []
    for number in range(40):
        for commit in engine.step():
            assert number < 3 or commit.row == key
            tokens += commit.token_ids if commit.row == key else ()
        if number == 2:
            engine.abort(other)
        check_books(engine)
    assert tokens == autoregressive(model, kept, [EOS])
    streamed = [commit for commits in engine.stream([kept]) for commit in commits]
    assert [token for commit in streamed for token in commit.token_ids] == tokens


def test_prefixes_are_reused():
    model = tiny_model(2)
    prompt = tuple(range(2, 22))
    engine = make_engine(model, lookahead=WIDE)
    (first,) = engine.generate([DecodeRequest(prompt, 12)])
    engine.add(DecodeRequest(prompt, 12))
    chunks = engine.scheduler.plan(1).chunks
    assert sum(chunk.count for chunk in chunks) <= 3 < len(prompt)
    again = make_engine(model, lookahead=WIDE)
    assert [again.generate([DecodeRequest(prompt, 12)])[0].token_ids for _ in range(2)] == [first.token_ids] * 2


def test_logprobs_are_those_of_the_model():
    model = tiny_model(3)
    plain, *asked = repeated(model, 4)
    asked = [replace(request, sampling=replace(request.sampling, logprobs=2)) for request in asked]
    engine = make_engine(model, lookahead=WIDE)
    commits = [commit for step in engine.stream([plain, *asked]) for commit in step]
    assert all(commit.logprobs is None for commit in commits if commit.row == 0)
    assert max(len(commit.token_ids) for commit in commits if commit.row > 0) > 1
    for row, request in enumerate(asked, 1):
        mine = [commit for commit in commits if commit.row == row]
        tokens = [token for commit in mine for token in commit.token_ids]
        found = [entry for commit in mine for entry in commit.logprobs]
        with torch.no_grad():
            logits_LV = model(torch.tensor([[*request.prompt_ids, *tokens]])).logits[0]
        expected_LV = logits_LV[len(request.prompt_ids) - 1 : -1].log_softmax(-1)
        for entry, token, expected_V in zip(found, tokens, expected_LV, strict=True):
            assert entry.logprob == pytest.approx(float(expected_V[token]), abs=1e-4)
            assert [token_id for token_id, _ in entry.top] == expected_V.topk(2).indices.tolist()


def test_filters_and_least_lengths_are_those_of_ar_in_the_engine():
    model = tiny_model(5)
    sampling = {"temperature": 1.1, "top_p": 0.9, "min_p": 0.02, "min_tokens": 18}
    batch = repeated(model, 5, temperature=1.1)
    batch = [replace(r, sampling=SamplingParams(seed=r.sampling.seed, **sampling)) for r in batch]
    expected = make_engine(model, window=1, max_rows=1).generate(batch)
    found = make_engine(model, lookahead=WIDE).generate(batch)
    assert [result.token_ids for result in found] == [result.token_ids for result in expected]
    assert min(len(result.token_ids) for result in found) >= 18


def test_stop_string_ends_a_response_with_its_last_token():
    tokenizer = train_tokenizer(["select name from pets where age is above three"], 300)
    model = tiny_model(3, vocab_size=len(tokenizer))
    prompt = tuple(tokenizer.encode("pets"))
    free = make_engine(model, window=1).generate([DecodeRequest(prompt, 40)])[0].token_ids
    text = tokenizer.decode(free)
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    engine = make_engine(model, lookahead=WIDE, tokenizer=tokenizer)
    key = engine.add(DecodeRequest(prompt, 40, SamplingParams(stop=(stop,))))
    engine.mode._states[key].pool.add([prompt[-1], *free])
    sequence = engine.sequence(key)
    while engine.num_unfinished:
        engine.step()
    count = len(sequence.result().token_ids)
    assert sequence.finish_reason == "stop"
    assert sequence.result().token_ids == free[:count]
    assert stop in tokenizer.decode(free[:count])
    assert stop not in tokenizer.decode(free[: count - 1])
    check_books(engine)


@pytest.mark.parametrize("key", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_penalties_are_refused_and_harm_no_other(key):
    model, good = tiny_model(1), DecodeRequest((3, 4), 9)
    engine = make_engine(model, lookahead=WIDE)
    engine.add(good)
    with pytest.raises(InputError, match=key):
        engine.add(DecodeRequest((3, 4), 9, SamplingParams(**{key: 1.5})))
    with pytest.raises(InputError, match="max_tokens is 96"):
        engine.add(DecodeRequest((3,) * 90, 7))
    sequence = engine.sequence(0)
    while engine.num_unfinished:
        engine.step()
    assert list(sequence.result().token_ids) == autoregressive(model, good, [EOS])


def test_a_request_needs_room_for_the_columns_as_well():
    engine = make_engine(tiny_model(1), lookahead=WIDE, num_blocks=15)
    with pytest.raises(InputError, match="need 19 cache blocks, there are 14"):  # 50 tokens, and 23 behind them
        engine.add(DecodeRequest((3,) * 40, 10))


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"record": True}, "record=True does not go together with lookahead"),
        ({"refill": "block"}, "refill=block"),
        ({"policy": "adaptive"}, "policy=adaptive"),
        ({"ngram": 3}, "ngram=3"),
        ({"overlap": True}, "overlap=True"),
        ({"lookahead": {"window": 0}}, "lookahead.window: Input should be greater"),
        ({"lookahead": {"ngram": 1}}, "lookahead.ngram"),
        ({"lookahead": {"candidates": 0}}, "lookahead.candidates"),
        ({"lookahead": {"levels": 3}}, "lookahead.levels"),
        ({"lookahead": {"window": 30, "candidates": 40}}, "lookahead: .*feeds.*at most 256, got 280"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(settings_, message):
    with pytest.raises(InputError, match=message) as error:
        EngineConfig.from_data({"lookahead": WIDE} | settings_, where="options")
    assert "\n" not in str(error.value)


def test_stats_count_what_candidates_added():
    model = tiny_model(3)
    engine = make_engine(model, lookahead=WIDE)
    results = engine.generate(repeated(model, 4))
    stats, accepted = engine.stats(), [count for result in results for count in result.accepted]
    assert (stats.method, stats.guesses, stats.scheduling) == ("lookahead", 3, "sync")
    assert stats.acceptance.steps == len(accepted)
    assert stats.acceptance.accepted == sum(accepted) - len(accepted) > 0


def test_steps_never_overlap():
    assert not make_engine(tiny_model(0), lookahead=WIDE).overlap
    assert not make_engine(tiny_model(0), lookahead=WIDE, overlap=False).overlap
