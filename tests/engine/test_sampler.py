"""The engine's draws against a reference in plain Python, token by token, and against the laws that they promise.

Shapes: S slots, B rows, W window, V vocabulary, K log-probabilities.
"""

import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch._subclasses.fake_tensor import FakeTensorMode

from cllm.decoding.records import DecodeRequest, SamplingParams
from cllm.decoding.sampling import TokenPicker, filter_logits_RV
from cllm.engine.sampler import Sampler
from cllm.errors import InputError
from tests.engine.slow import slow_token
from tests.fakes import EOS

VOCAB, CPU = 12, torch.device("cpu")


def make_sampler(num_slots=4, vocab_size=VOCAB, **options):
    return Sampler(num_slots, vocab_size, [EOS], CPU, **options)


class ToyModel:
    """Logits from the last two tokens of the context."""

    def __init__(self, seed):
        self.table_VVV = 3 * torch.randn(VOCAB, VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed))

    def logits_V(self, context):
        return self.table_VVV[context[-2], context[-1]]

    def autoregressive(self, prompt, params, count):
        output = []
        for _ in range(count):
            output.append(slow_token(self.logits_V([*prompt, *output]), params, prompt, output))
        return output


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_k=st.sampled_from([0, 0, 1, 5]),
    top_p=st.sampled_from([1.0, 0.8, 0.3]),
    min_p=st.sampled_from([0.0, 0.0, 0.1, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.6]),
    presence_penalty=st.sampled_from([0.0, 0.9, -0.8]),
    frequency_penalty=st.sampled_from([0.0, 0.7, -0.4]),
    seed=st.integers(0, 2**64 - 1),
    min_tokens=st.sampled_from([0, 0, 4, 40]),
    stop_token_ids=st.sampled_from([(), (3,), (3, 7)]),
    ignore_eos=st.booleans(),
)
REQUESTS = st.lists(
    st.tuples(st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=6), PARAMS), min_size=1, max_size=4
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    requests=REQUESTS,
    width=st.integers(1, 6),
    right=st.sampled_from([0.0, 0.6, 1.0]),
    seed=st.integers(0, 99),
)
def test_jacobi_windows_draw_what_autoregressive_decoding_draws(requests, width, right, seed):
    """Every accepted token, whatever share of the guesses is right, and rows that commit different numbers."""
    length, model, rng = 14, ToyModel(seed), random.Random(seed)
    expected = [model.autoregressive(prompt, params, length) for prompt, params in requests]
    slots = rng.sample(range(4), len(requests))
    sampler = make_sampler()
    for slot, (prompt, params) in zip(slots, requests, strict=True):
        sampler.set(slot, params, prompt)
    outputs = [[] for _ in requests]
    while running := [row for row, output in enumerate(outputs) if len(output) < length]:
        windows, logits = [], []
        for row in running:
            committed = [*requests[row][0], *outputs[row]]
            ahead = expected[row][len(outputs[row]) :] + [0] * width
            guesses = [token if rng.random() < right else rng.randrange(VOCAB) for token in ahead[: width - 1]]
            windows.append([committed[-1], *guesses])
            logits.append(torch.stack([model.logits_V(committed + guesses[:i]) for i in range(width)]))
        positions = [[len(requests[row][0]) + len(outputs[row]) + i for i in range(width)] for row in running]
        slots_B = torch.tensor([slots[row] for row in running])
        predictions_BW = sampler.pick_BW(torch.stack(logits), torch.tensor(windows), torch.tensor(positions), slots_B)
        counts = []
        for row, window, predictions in zip(running, windows, predictions_BW.tolist(), strict=True):
            count = 1
            while count < width and window[count] == predictions[count - 1]:
                count += 1
            outputs[row] += predictions[:count]
            counts.append(count)
        sampler.commit(slots_B, predictions_BW, torch.tensor(counts))
    assert [output[:length] for output in outputs] == expected


def test_penalties_count_the_guesses_before_a_prediction_and_not_the_seed_twice():
    """Token 2 leads by 0.9, and each time that the response holds it costs 0.6: once leaves it in front, twice not."""
    sampler = make_sampler()
    sampler.set(0, SamplingParams(frequency_penalty=0.6), prompt_ids=[2, 2, 2])
    logits_111V = torch.zeros(1, 1, VOCAB)
    logits_111V[..., 2], logits_111V[..., 5] = 1.0, 0.1
    logits_1WV = logits_111V.repeat(1, 4, 1)

    def pick(*window):
        start = 3
        return sampler.pick_BW(
            logits_1WV, torch.tensor([window]), torch.arange(start, start + 4)[None], torch.tensor([0])
        )[0].tolist()

    assert pick(2, 2, 2, 2) == [2, 2, 5, 5]  # the prompt does not count, nor does the seed
    assert pick(2, 7, 2, 7) == [2, 2, 2, 2]  # wrong guesses count too: nothing behind them is accepted
    sampler.commit(torch.tensor([0]), torch.tensor([[2, 2, 2, 2]]), torch.tensor([1]))
    assert pick(2, 2, 7, 2) == [2, 5, 5, 5]
    sampler.commit(torch.tensor([0]), torch.tensor([[2, 7, 7, 7]]), torch.tensor([1]))
    assert pick(2, 7, 7, 7) == [5, 5, 5, 5]


def test_min_tokens_holds_back_every_ending_token_by_position():
    sampler = make_sampler()
    logits_1WV = torch.zeros(1, 3, VOCAB)
    logits_1WV[..., EOS], logits_1WV[..., 4], logits_1WV[..., 6] = 3.0, 2.0, 1.0
    window_1W, positions_1W = torch.zeros(1, 3, dtype=torch.long), torch.tensor([[5, 6, 7]])

    def pick(params):
        sampler.set(2, params, prompt_ids=[0] * 5)
        return sampler.pick_BW(logits_1WV, window_1W, positions_1W, torch.tensor([2]))[0].tolist()

    params = SamplingParams(min_tokens=2, stop_token_ids=(4,))
    assert pick(params) == [6, 6, EOS]
    assert pick(replace(params, stop_token_ids=())) == [4, 4, EOS]
    assert pick(replace(params, ignore_eos=True)) == [EOS, EOS, EOS]


def test_a_slot_forgets_its_last_request():
    sampler = make_sampler()
    prompt, output = [3, 4], [5, 5, 6]
    params = SamplingParams(repetition_penalty=2.0, frequency_penalty=1.0, presence_penalty=0.5, min_tokens=9)
    logits_1WV, window_1W, positions_1W = torch.randn(1, 2, VOCAB), torch.tensor([[6, 5]]), torch.tensor([[5, 6]])
    slots_1 = torch.tensor([1])

    def pick():
        return sampler.pick_BW(logits_1WV, window_1W, positions_1W, slots_1)

    sampler.set(1, params, [7, 8, 9])
    sampler.commit(slots_1, torch.tensor([[9, 9, 9, 2]]), torch.tensor([4]))
    sampler.set(1, params, prompt)
    sampler.commit(slots_1, torch.tensor([output]), torch.tensor([3]))
    committed = pick()
    sampler.set(1, params, prompt, output)  # as after a preemption
    assert torch.equal(pick(), committed)
    expected = [slow_token(logits_1WV[0, 0], params, prompt, output)]
    expected.append(slow_token(logits_1WV[0, 1], params, prompt, [*output, 5]))
    assert committed[0].tolist() == expected
    sampler.clear(1)
    assert torch.equal(pick(), logits_1WV.argmax(-1))


def test_a_greedy_request_is_not_held_to_the_least_length_of_earlier_tenants():
    """Slot 0 has seen min_tokens and long prompts; another slot's min_tokens makes the step look at all limits."""
    sampler = make_sampler()
    sampler.set(0, SamplingParams(min_tokens=5), [2, 3, 4])
    sampler.set(0, SamplingParams(), [2] * 100)  # without a `clear` between them, as after a preemption
    sampler.clear(0)
    sampler.set(0, SamplingParams(), [2] * 10)
    sampler.set(1, SamplingParams(min_tokens=5), [2] * 10)
    logits_BWV = torch.zeros(2, 1, VOCAB)
    logits_BWV[..., EOS], logits_BWV[..., 7] = 2.0, 1.0
    window_B1, positions_B1 = torch.full((2, 1), 2), torch.full((2, 1), 12)
    picked_B1 = sampler.pick_BW(logits_BWV, window_B1, positions_B1, torch.arange(2))
    assert picked_B1.flatten().tolist() == [EOS, 7]


def test_large_steps_are_worked_off_in_slices_and_give_the_same():
    requests = [
        SamplingParams(temperature=1.0, seed=1, logprobs=2),
        SamplingParams(temperature=0.9, top_p=0.9, frequency_penalty=0.5, min_tokens=5, seed=2),
        SamplingParams(),
    ]
    generator = torch.Generator().manual_seed(0)
    logits_BWV = torch.randn(3, 2, VOCAB, generator=generator)
    window_BW, positions_BW = torch.randint(VOCAB, (3, 2), generator=generator), torch.tensor([[4, 5]] * 3)
    found = []
    for at_once in (1000, 1):
        sampler = make_sampler(at_once=at_once)
        for slot, params in enumerate(requests):
            sampler.set(slot, params, [slot, 7])
        tokens_BW = sampler.pick_BW(logits_BWV, window_BW, positions_BW, torch.arange(3))
        logprobs = sampler.logprobs(logits_BWV, tokens_BW)
        found.append((tokens_BW, logprobs.chosen_BW, logprobs.top_BWK, logprobs.top_ids_BWK))
    for whole, sliced in zip(*found, strict=True):
        assert torch.equal(whole, sliced)


def test_a_request_draws_the_same_alone_and_in_any_batch():
    vocab, width = 5_000, 3
    requests = [
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=0.9, top_p=0.9, seed=2),
        SamplingParams(temperature=1.2, min_p=0.01, top_k=50, seed=3),
        SamplingParams(),
        SamplingParams(temperature=0.8, repetition_penalty=1.2, frequency_penalty=0.3, min_tokens=5, seed=4),
        SamplingParams(temperature=1.0, seed=5, logprobs=2),
    ]
    logits_BWV = torch.randn(len(requests), width, vocab, generator=torch.Generator().manual_seed(0))
    window_BW = torch.arange(len(requests) * width).view(-1, width)
    positions_BW = 4 + torch.arange(width).repeat(len(requests), 1)

    together = make_sampler(len(requests), vocab)
    for slot, params in enumerate(requests):
        together.set(slot, params, [slot, 7])
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    tokens_BW = together.pick_BW(logits_BWV[order], window_BW[order], positions_BW, order)
    for row, slot in enumerate(order.tolist()):
        alone = make_sampler(1, vocab)
        alone.set(0, requests[slot], [slot, 7])
        picked_1W = alone.pick_BW(
            logits_BWV[slot, None], window_BW[slot, None], positions_BW[:1], torch.tensor([0], dtype=torch.int32)
        )
        assert torch.equal(picked_1W[0], tokens_BW[row]), requests[slot]


def test_a_row_without_top_p_keeps_tokens_behind_a_mass_that_rounds_to_1():
    logits_RV = torch.zeros(2, 50)
    logits_RV[:, 0] = 20.0
    kept_RV = filter_logits_RV(logits_RV, torch.tensor([0, 0]), torch.tensor([1.0, 0.5])).isfinite()
    assert kept_RV.sum(1).tolist() == [50, 1]


def test_min_p_draws_follow_the_renormalised_law():
    """20,000 positions of one request are as many independent draws."""
    draws, params = 20_000, SamplingParams(temperature=0.8, min_p=0.15, seed=6)
    logits_V = torch.tensor([2.0, 1.5, 0.9, 0.0, -1.0, 1.9, 0.55, 0.4])
    probs_V = (logits_V.double() / 0.8).softmax(-1)
    allowed_V = probs_V >= 0.15 * probs_V.max()
    assert 1 < allowed_V.sum() < len(logits_V)
    sampler = make_sampler(1, len(logits_V))
    sampler.set(0, params, [0])
    tokens_1W = sampler.pick_BW(
        logits_V.expand(1, draws, -1),
        torch.zeros(1, draws, dtype=torch.long),
        torch.arange(draws)[None],
        torch.tensor([0]),
    )
    counts_V = tokens_1W[0].bincount(minlength=len(logits_V))
    assert counts_V[~allowed_V].sum() == 0
    expected = probs_V[allowed_V] / probs_V[allowed_V].sum() * draws
    assert stats.chisquare(counts_V[allowed_V].numpy(), expected.numpy()).pvalue > 1e-3


def test_logprobs_are_those_of_the_raw_logits():
    sampler = make_sampler()
    sampler.set(0, SamplingParams(temperature=2.0, top_k=2, repetition_penalty=3.0, logprobs=3, seed=1), [1, 2])
    sampler.set(1, SamplingParams(logprobs=0), [1, 2])
    logits_BWV = torch.randn(3, 2, VOCAB).bfloat16()
    tokens_BW = torch.randint(VOCAB, (3, 2))
    got = sampler.logprobs(logits_BWV, tokens_BW)
    raw_BWV = logits_BWV.float().log_softmax(-1)
    torch.testing.assert_close(got.chosen_BW, raw_BWV.gather(-1, tokens_BW[..., None])[..., 0])
    torch.testing.assert_close(got.top_BWK, raw_BWV.sort(-1, descending=True).values[..., :3])
    torch.testing.assert_close(raw_BWV.gather(-1, got.top_ids_BWK), got.top_BWK)
    sampler.clear(0)
    assert sampler.logprobs(logits_BWV, tokens_BW).top_BWK.shape == (3, 2, 0)
    sampler.set(1, SamplingParams(logprobs=20), [1])
    assert sampler.logprobs(logits_BWV, tokens_BW).top_BWK.shape == (3, 2, VOCAB)
    sampler.clear(1)
    assert sampler.logprobs(logits_BWV, tokens_BW) is None


@pytest.mark.parametrize(
    ("params", "work"),
    [
        (SamplingParams(seed=5, top_p=0.5, stop=("x",), ignore_eos=True), "greedy"),
        (SamplingParams(temperature=0.1), "drawn"),
        (SamplingParams(min_tokens=1), "drawn"),
        (SamplingParams(temperature=0.1, top_p=0.5), "adjusted"),
        (SamplingParams(temperature=0.1, top_k=5), "adjusted"),
        (SamplingParams(temperature=0.1, min_p=0.5), "adjusted"),
        (SamplingParams(logprobs=0), "adjusted"),
        (SamplingParams(presence_penalty=0.1), "adjusted"),
        (SamplingParams(frequency_penalty=-0.1), "adjusted"),
        (SamplingParams(repetition_penalty=1.1), "adjusted"),
    ],
)
def test_what_a_slot_needs_follows_from_its_parameters(params, work):
    sampler = make_sampler()
    sampler.set(2, params, [1])
    for slots in ([0, 1, 2], [0, 1, 3], [2]):
        expected = work if 2 in slots else "greedy"
        assert sampler.work(slots) == expected
        assert sampler.is_greedy(slots) == (expected == "greedy")
    sampler.clear(2)
    assert sampler.work([2]) == "greedy"


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, seed=3, logprobs=4),
        SamplingParams(temperature=1.0, repetition_penalty=1.2, frequency_penalty=0.4, min_tokens=3),
    ],
)
def test_no_step_reads_the_device(params):
    """Tensors without data let every operation pass but one whose result the host would have to wait for."""
    sampler = make_sampler()
    sampler.set(0, params, [1, 2])
    with FakeTensorMode(allow_non_fake_inputs=True):
        logits_BWV = torch.randn(2, 3, VOCAB)
        window_BW, slots_B = torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, dtype=torch.long)
        tokens_BW = sampler.pick_BW(logits_BWV, window_BW, window_BW + 2, slots_B)
        sampler.logprobs(logits_BWV, tokens_BW)
        sampler.commit(slots_B, tokens_BW, slots_B + 1)
        assert tokens_BW.shape == (2, 3)


def test_the_slow_decoders_draws_are_the_engines():
    requests = [SamplingParams(temperature=1.1, min_p=0.2, top_k=8, top_p=0.9, seed=2**64 - 5), SamplingParams()]
    logits_BWV, positions_BW = torch.randn(2, 4, VOCAB), torch.arange(4).repeat(2, 1)
    sampler = make_sampler()
    for slot, params in enumerate(requests):
        sampler.set(slot, params, [0])
    picked_BW = sampler.pick_BW(logits_BWV, torch.zeros_like(positions_BW), positions_BW, torch.tensor([0, 1]))
    assert torch.equal(TokenPicker(requests, CPU).pick_BQ(logits_BWV, positions_BW, [0, 1]), picked_BW)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("min_p", 0.5),
        ("repetition_penalty", 1.1),
        ("presence_penalty", 1),
        ("frequency_penalty", 1),
        ("logprobs", 0),
        ("min_tokens", 1),
        ("stop", ("a",)),
        ("stop_token_ids", (1,)),
        ("ignore_eos", True),
    ],
)
def test_the_slow_decoder_refuses_what_it_would_ignore(name, value):
    params = SamplingParams(**{name: value})
    if name == "min_p":
        TokenPicker([params], CPU)
    else:
        with pytest.raises(InputError, match=name):
            TokenPicker([params], CPU)


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, NAN, INF, "1", True, None, 10**400]),
        ("top_k", [-1, 1.5, True, "3", 10**20]),
        ("top_p", [0, 1.01, -1, NAN, "x"]),
        ("min_p", [-0.1, 1.1, NAN, None]),
        ("repetition_penalty", [0, -1, NAN, INF]),
        ("presence_penalty", [-2.1, 2.1, NAN, "x"]),
        ("frequency_penalty", [-2.1, 2.1, INF, False]),
        ("seed", [1.0, "1", None, True]),
        ("logprobs", [-1, 21, 1.0, True]),
        ("min_tokens", [-1, 0.5, None]),
        ("stop", ["word", 3, ("a", ""), ("a", 3), ["a"], None]),
        ("stop_token_ids", [3, (1, -2), (1.0,), (True,), [1], None]),
        ("ignore_eos", [1, None, "yes"]),
    ],
)
def test_bad_parameters_are_named(name, values):
    for value in values:
        with pytest.raises(InputError, match=f"^{name} must be .*got") as error:
            SamplingParams(**{name: value})
        assert "\n" not in str(error.value)


def test_the_limits_themselves_are_good():
    SamplingParams(min_p=1, presence_penalty=-2, frequency_penalty=2, logprobs=20, seed=-(2**70), temperature=3)


def test_requests_that_cannot_be_met_are_named():
    with pytest.raises(InputError, match="stop_token_ids must be < 12"):
        make_sampler().set(0, SamplingParams(stop_token_ids=(3, VOCAB)), [1])
    with pytest.raises(InputError, match="min_tokens must be <= max_new_tokens"):
        DecodeRequest((1,), 3, SamplingParams(min_tokens=4))
