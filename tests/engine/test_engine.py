"""The engine gives AR's tokens, whatever else runs beside a request and whatever happens to it on the way."""

import random
import tracemalloc
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.decoding.decoder import JacobiDecoder
from cllm.decoding.records import DecodeRequest, SamplingParams
from cllm.decoding.reference import autoregressive
from cllm.engine.config import EngineConfig
from cllm.engine.policy import FixedWindow
from cllm.errors import InputError
from cllm.tasks.tokenizer import train_tokenizer
from tests.engine.making import check_books, make_engine, requests
from tests.engine.slow import letter_tokenizer, slow_response
from tests.fakes import EOS, FAMILIES, PAD, tiny_model


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    model_seed=st.integers(0, 7),
    requests=requests(),
    window=st.sampled_from([1, 2, 3, 5, 8, 16]),
    refill=st.sampled_from(["block", "sliding"]),
    guess=st.sampled_from(["prompt", "pad"]),
    ngram=st.sampled_from([0, 2, 3]),
    max_rows=st.integers(1, 4),
    overlap=st.booleans(),
    spare_blocks=st.integers(0, 20),
)
def test_any_batch_equals_autoregressive(
    model_seed, requests, window, refill, guess, ngram, max_rows, overlap, spare_blocks
):
    model = tiny_model(model_seed)
    longest = max(len(request.prompt_ids) + request.max_new_tokens for request in requests)
    engine = make_engine(
        model,
        num_blocks=1 + -(-longest // 4) + spare_blocks,
        window=window,
        refill=refill,
        guess=guess,
        ngram=ngram if refill == "sliding" else 0,
        max_rows=max_rows,
        overlap=overlap,
    )
    results = engine.generate(requests)
    check_books(engine)
    for request, result in zip(requests, results, strict=True):
        expected = autoregressive(model, request, [EOS])
        assert list(result.token_ids) == expected
        assert sum(result.accepted) == len(expected)
        assert min(result.accepted) >= 1
        assert result.finish_reason == ("stop" if expected[-1] == EOS else "length")


SETTINGS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.0, 1.1]),
    top_p=st.sampled_from([1.0, 1.0, 0.8]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.4]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.8]),
    seed=st.integers(0, 2**63),
    logprobs=st.sampled_from([None, None, 2]),
    min_tokens=st.sampled_from([0, 0, 3, 12]),
    stop=st.sampled_from([(), (), ("f",), ("gh", "j", "xx")]),
    stop_token_ids=st.sampled_from([(), (), (5, 9)]),
    ignore_eos=st.booleans(),
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    model_seed=st.integers(0, 7),
    sampling=st.lists(SETTINGS, min_size=2, max_size=7),
    window=st.sampled_from([1, 3, 8]),
    refill=st.sampled_from(["block", "sliding"]),
    overlap=st.booleans(),
    spare_blocks=st.integers(0, 8),
    aborted=st.sets(st.integers(0, 6), max_size=2),
)
def test_requests_of_all_kinds_share_a_batch(model_seed, sampling, window, refill, overlap, spare_blocks, aborted):
    """Rows are preempted on the way, and some aborted; slots pass from one kind of request to another."""
    model = tiny_model(model_seed)
    requests = [DecodeRequest((3 + i, 4, 9)[: 1 + i % 3], 12 + 2 * i, each) for i, each in enumerate(sampling)]
    engine = make_engine(
        model,
        num_blocks=9 + spare_blocks,
        window=window,
        refill=refill,
        max_rows=3,
        overlap=overlap,
        tokenizer=letter_tokenizer(),
    )
    keys = [engine.add(request) for request in requests]
    found = {key: [] for key in keys}
    for number in range(1000):
        for commit in engine.step():
            found[commit.row] += commit.token_ids
            asked = requests[commit.row].sampling.logprobs
            assert (commit.logprobs is None) == (asked is None)
        if number == 2:
            for key in aborted:
                engine.abort(key)
        check_books(engine)
        if engine.num_unfinished == 0:
            break
    for key, request in zip(keys, requests, strict=True):
        expected = slow_response(model, request)
        assert found[key] == (expected[: len(found[key])] if key in aborted else expected)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_refused_request_and_a_stream_that_is_closed_leave_nothing_behind(overlap):
    model = tiny_model(4)
    engine, good = make_engine(model, window=4, overlap=overlap), DecodeRequest((3, 4), 40)
    too_long = DecodeRequest((3,) * 90, 7)
    for decode in (engine.generate, lambda requests: list(engine.stream(requests))):
        with pytest.raises(InputError, match="max_tokens is 96"):
            decode([good, too_long])
        assert engine.num_unfinished == 0
    stream = engine.stream([good, DecodeRequest((5,), 40)])
    next(stream)
    assert engine.num_unfinished == 2
    stream.close()
    assert engine.num_unfinished == 0
    engine.step()
    check_books(engine)
    assert list(engine.generate([good])[0].token_ids) == autoregressive(model, good, [EOS])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("refill", ["block", "sliding"])
def test_forwards_are_those_of_the_slow_decoder(family, refill):
    """Not only the tokens: each forward commits what the same forward of the slow decoder commits."""
    model = tiny_model(3, family=family)
    requests = [DecodeRequest((5, 6, 7), 20), DecodeRequest((9,), 11), DecodeRequest(tuple(range(2, 20)), 17)]
    slow = JacobiDecoder(model, block_size=6, refill=refill, eos_ids=[EOS], pad_id=PAD).generate(requests)
    for overlap in (False, True):
        fast = make_engine(model, window=6, refill=refill, overlap=overlap).generate(requests)
        assert [result.accepted for result in fast] == [result.accepted for result in slow]
        assert [result.token_ids for result in fast] == [result.token_ids for result in slow]


@pytest.mark.parametrize("num_blocks", [14, 80])
def test_recorded_trajectories_are_those_of_the_slow_decoder(num_blocks):
    """Also where rows are preempted and recomputed on the way."""
    model = tiny_model(2)
    requests = [DecodeRequest((3, 9, 4, 11), 37), DecodeRequest((8,), 40), DecodeRequest((8, 5), 33)]
    slow = JacobiDecoder(model, block_size=5, refill="block", eos_ids=[EOS], pad_id=PAD, record=True)
    for overlap in (False, True):
        engine = make_engine(
            model, num_blocks=num_blocks, window=5, refill="block", record=True, overlap=overlap, prefill_tokens=4
        )
        assert [r.trajectory for r in engine.generate(requests)] == [r.trajectory for r in slow.generate(requests)]


@pytest.mark.parametrize("overlap", [False, True])
def test_step_times_do_not_hold_the_reading_of_prompts(overlap, monkeypatch):
    """With overlap the host launches the next step, prompts included, before it reads the result of this one."""

    class Notes(FixedWindow):
        def measured(self, batch, n, milliseconds, work="greedy"):
            noted.append(len(alone))

    noted, alone = [], []
    engine = make_engine(tiny_model(2), policy=Notes(4), window=4, max_rows=2, overlap=overlap)
    launch = engine.runner.launch

    def note(*args, **kwargs):
        alone.append(kwargs["alone"])
        return launch(*args, **kwargs)

    monkeypatch.setattr(engine.runner, "launch", note)
    engine.generate([DecodeRequest((3, 9, 4), count) for count in (3, 30, 20, 25, 6)])
    assert alone.count(False) > 2, "no prompt was read while another row decoded"
    if overlap:  # a step is read when the next one has been launched, and the last one not at all
        assert noted == [i + 1 for i in range(1, len(alone)) if alone[i - 1] and alone[i]]
    else:
        assert noted == [i for i, is_alone in enumerate(alone, 1) if is_alone]


def test_wide_windows_may_change_from_step_to_step():
    class RandomWindow:
        rng = random.Random(0)

        def choose(self, rows, work="greedy"):
            return self.rng.randint(1, 9)

        def observe(self, row, window, accepted):
            assert 1 <= accepted <= window

        def measured(self, batch, window, milliseconds, work="greedy"):
            assert milliseconds > 0

        def forget(self, row):
            pass

    model = tiny_model(5)
    requests = [DecodeRequest((3 + i, 4), 30, SamplingParams(temperature=i % 2, seed=i)) for i in range(9)]
    results = make_engine(model, window=9, policy=RandomWindow(), overlap=True).generate(requests)
    assert [list(r.token_ids) for r in results] == [autoregressive(model, r, [EOS]) for r in requests]


def test_streams_and_aborts():
    model = tiny_model(4)
    engine = make_engine(model, window=4, overlap=True)
    kept, dropped = DecodeRequest((3, 4), 30), DecodeRequest((5, 6, 7), 60, SamplingParams(ignore_eos=True))
    key, other = engine.add(kept), engine.add(dropped)
    tokens, reason = [], None
    for number in range(60):
        for commit in engine.step():
            assert number < 3 or commit.row == key
            tokens += commit.token_ids if commit.row == key else ()
            reason = commit.finish_reason if commit.row == key else reason
        if number == 2:
            engine.abort(other)
            engine.abort(other)
        check_books(engine)
    assert tokens == autoregressive(model, kept, [EOS])
    assert reason is not None
    streamed = [commit for commits in engine.stream([kept]) for commit in commits]
    assert [t for commit in streamed for t in commit.token_ids] == tokens


def test_soak_of_two_thousand_requests():
    """Every request is answered once, a few aborted ones aside; no block is lost, and the second thousand takes no
    memory that the first did not.
    """
    model, rng = tiny_model(6, layers=1), random.Random(0)
    engine = make_engine(model, window=4, max_rows=16, num_blocks=120, overlap=True, prefill_tokens=32)
    finished: dict[int, str] = {}
    aborted, added = set(), 0
    while added < 2000 or engine.num_unfinished:
        while added < 2000 and engine.num_unfinished < 24:
            prompt = tuple(rng.choices(range(2, 24), k=rng.randint(1, 20)))
            sampling = SamplingParams(temperature=rng.choice([0.0, 1.0]), seed=added)
            engine.add(DecodeRequest(prompt, rng.randint(1, 16), sampling))
            added += 1
            if added == 1000:
                tracemalloc.start()
        for commit in engine.step():
            assert commit.row not in finished
            assert commit.row not in aborted
            if commit.finish_reason is not None:
                finished[commit.row] = commit.finish_reason
        if rng.random() < 0.05:
            key = rng.randrange(added)
            if key not in finished:
                engine.abort(key)
                aborted.add(key)
    engine.step()
    check_books(engine)
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown < 1 << 20  # what this test notes itself included; a thousand requests would take several times that
    assert len(finished) + len(aborted) == 2000
    assert set(finished.values()) == {"stop", "length"}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (DecodeRequest((3,) * 90, 7), "max_tokens is 96"),
        (DecodeRequest((3, 24), 7), "prompt_ids: token 24 is not in the vocabulary"),
        (DecodeRequest((3, -1), 7), "prompt_ids: token -1 is not in the vocabulary"),
        (DecodeRequest((3,), 7, SamplingParams(stop_token_ids=(24,))), "stop_token_ids: token 24 is not"),
    ],
)
def test_bad_request_is_refused_and_harms_no_other(request_, message):
    model = tiny_model(1)
    engine, good = make_engine(model, window=3), DecodeRequest((3, 4), 9)
    key = engine.add(good)
    with pytest.raises(InputError, match=message):
        engine.add(request_)
    tokens = []
    while engine.num_unfinished:
        for commit in engine.step():
            assert commit.row == key
            tokens += commit.token_ids
    assert tokens == autoregressive(model, good, [EOS])


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"record": True}, "record: .*refill 'block'"),
        ({"record": True, "refill": "block", "ngram": 3}, "record: .*ngram 0"),
        ({"max_tokens": 257}, "256 positions"),
        ({"num_blocks": 1}, "num_blocks"),
    ],
)
def test_impossible_settings_are_refused(settings_, message):
    with pytest.raises(ValueError, match=message):
        make_engine(tiny_model(0), **settings_)


def test_config_is_strict():
    with pytest.raises(ValueError, match="windows"):
        EngineConfig.model_validate({"windows": 3})
    with pytest.raises(ValueError, match="refill: 'block' needs policy 'fixed'"):
        EngineConfig.model_validate({"refill": "block", "policy": "adaptive"})
    for ngram in (1, 9):
        with pytest.raises(ValueError, match=r"ngram\n.*0, 2, 3, 4, 5, 6, 7 or 8"):
            EngineConfig.model_validate({"ngram": ngram})


def test_logprobs_are_those_of_the_model():
    model = tiny_model(3)
    plain, asked = DecodeRequest((7, 8), 12), DecodeRequest((3, 4, 5), 12, SamplingParams(logprobs=2))
    engine = make_engine(model, window=4)
    commits = [commit for step in engine.stream([plain, asked]) for commit in step]
    assert all(commit.logprobs is None for commit in commits if commit.row == 0)
    found = [entry for commit in commits if commit.row == 1 for entry in commit.logprobs]
    tokens = [token for commit in commits if commit.row == 1 for token in commit.token_ids]
    with torch.no_grad():
        logits_LV = model(torch.tensor([[*asked.prompt_ids, *tokens]])).logits[0]
    expected_LV = logits_LV[len(asked.prompt_ids) - 1 : -1].log_softmax(-1)
    assert len(found) == len(tokens)
    for entry, token, expected_V in zip(found, tokens, expected_LV, strict=True):
        assert entry.logprob == pytest.approx(float(expected_V[token]), abs=1e-4)
        assert [token_id for token_id, _ in entry.top] == expected_V.topk(2).indices.tolist()


@pytest.mark.parametrize("overlap", [False, True])
def test_stop_string_ends_a_response_with_its_last_token(overlap):
    tokenizer = train_tokenizer(["select name from pets where age is above three"], 300)
    model = tiny_model(3, vocab_size=len(tokenizer))
    prompt = tuple(tokenizer.encode("pets"))
    free = make_engine(model, window=4).generate([DecodeRequest(prompt, 40)])[0].token_ids
    text = tokenizer.decode(free)
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    engine = make_engine(model, window=4, overlap=overlap, tokenizer=tokenizer)
    result = engine.generate([DecodeRequest(prompt, 40, SamplingParams(stop=(stop,)))])[0]
    count = len(result.token_ids)
    assert result.finish_reason == "stop"
    assert result.token_ids == free[:count]
    assert stop in tokenizer.decode(free[:count])
    assert stop not in tokenizer.decode(free[: count - 1])
    check_books(engine)
    with pytest.raises(InputError, match="stop"):
        make_engine(model).add(DecodeRequest(prompt, 4, SamplingParams(stop=("x",))))


@pytest.mark.parametrize(
    "kinds",
    [
        [SamplingParams(temperature=0.9, frequency_penalty=1.5, repetition_penalty=1.3, min_tokens=20)],
        [SamplingParams(min_tokens=30), SamplingParams(temperature=0.9, min_tokens=20, ignore_eos=True)],
    ],
)
def test_penalties_survive_preemption(kinds):
    """Counts of tokens are rebuilt when a row gets another place, and slots forget who was preempted."""
    model = tiny_model(5)
    requests = [DecodeRequest((3 + i, 4, 9), 40, replace(kinds[i % len(kinds)], seed=i)) for i in range(4)]
    roomy = make_engine(model, window=1, max_rows=1).generate(requests)
    tight = make_engine(model, window=5, num_blocks=16, overlap=True)
    assert [r.token_ids for r in tight.generate(requests)] == [r.token_ids for r in roomy]
    assert [list(r.token_ids) for r in roomy] == [slow_response(model, request) for request in requests]
    assert min(len(r.token_ids) for r in roomy) >= 20
