"""What the runner asks of the model: tables as wide as windows, and step times that leave no trace."""

import importlib.util
from dataclasses import dataclass

import pytest
import torch

from cllm.decoding.records import DecodeRequest, SamplingParams
from cllm.decoding.reference import autoregressive
from cllm.engine.attention import Attention, TorchAttention, Windows
from cllm.engine.config import EngineConfig
from cllm.engine.graphs import prompt_bucket, prompt_buckets
from cllm.engine.jacobi import time_steps
from cllm.engine.load import build_engine, step_sizes
from cllm.engine.ops import Pages
from cllm.engine.policy import AdaptiveWindow
from cllm.engine.state import DeviceState
from cllm.engine.weights import model_from_transformers
from tests.engine.making import check_books, make_engine
from tests.fakes import EOS, PAD, tiny_model

CPU = torch.device("cpu")
needs_interpreter = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(), reason="needs Triton's interpreter"
)


@dataclass
class Watched:
    """Another attention, and how far windows have reached behind the tables: kernels would read what lies there."""

    inner: Attention
    num_layers_prepared = 0
    widest = 0

    def prepare(self, windows: Windows, num_heads: int, pages: Pages) -> Windows:
        self.num_layers_prepared += 1
        return self.inner.prepare(windows, num_heads, pages)

    def __call__(self, q_THD: torch.Tensor, pages: Pages, windows: Windows) -> torch.Tensor:
        room = windows.tables_BM.shape[1] * pages.keys_NSKD.shape[1]
        assert int(windows.starts_B.max()) + windows.width <= room, "a window reaches behind its table"
        self.widest = max(self.widest, windows.width)
        return self.inner(q_THD, pages, windows)


@pytest.mark.parametrize("kernel", ["torch", pytest.param("triton", marks=needs_interpreter)])
def test_padding_behind_a_late_chunk_has_a_place_in_the_table(kernel):
    """A prompt whose beginning is known is read from far behind, together with a longer piece of a new one."""
    model = tiny_model(3)
    inner: Attention = TorchAttention()
    if kernel == "triton":
        from cllm.engine.triton_attention import TritonAttention

        inner = TritonAttention(CPU)
    watched = Watched(inner)
    engine = make_engine(model, window=2, prefill_tokens=96, attention=watched)
    long, new = tuple(3 + i % 19 for i in range(90)), tuple(4 + i % 17 for i in range(40))
    engine.generate([DecodeRequest(long[:61], 1)])
    requests = [DecodeRequest(long, 5), DecodeRequest(new, 5)]
    results = engine.generate(requests)
    assert watched.widest == 64  # the first piece; then 48 for a piece that starts at 60, of 96 + 4 places
    assert [list(result.token_ids) for result in results] == [autoregressive(model, r, [EOS]) for r in requests]
    check_books(engine)


def test_attention_is_prepared_once_a_forward_for_all_layers():
    watched = Watched(TorchAttention())
    engine = make_engine(tiny_model(3, layers=3), window=2, attention=watched)
    (result,) = engine.generate([DecodeRequest((3, 4, 5), 6)])
    assert watched.num_layers_prepared == result.num_forwards + 1  # and one for the prompt


def test_rows_of_a_rehearsal_share_no_block():
    state = DeviceState(num_rows=4, max_tokens=40, margin=4, block_tokens=4, fill_id=0, device=CPU)
    state.rehearse(3, context=10, width=4, num_blocks=50)
    blocks = state.tables_RM[:3, :4].flatten().tolist()
    assert len(set(blocks)) == 12
    assert 0 not in blocks
    assert state.length_R.tolist() == state.limit_R.tolist() == [10, 10, 10, 1, 1]
    state.rehearse(3, context=10, width=4, num_blocks=5)  # fewer than needed: all of them, but the null block
    assert set(state.tables_RM[:3, :4].flatten().tolist()) == {1, 2, 3, 4}
    state.reset()
    assert not state.tables_RM.any()
    assert state.length_R.tolist() == [1] * 5


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=1.0, top_p=0.9)])
def test_step_times_are_taken_before_any_request_and_leave_no_trace(sampling):
    model = tiny_model(3)
    engine = make_engine(model, window=4)
    table = time_steps(engine.runner, [1, 4], [1, 2, 4], 30, sampling)
    assert (table.milliseconds > 0).all()
    check_books(engine)
    requests = [DecodeRequest((3 + i, 4), 20) for i in range(6)]
    results = engine.generate(requests)
    assert [list(result.token_ids) for result in results] == [autoregressive(model, r, [EOS]) for r in requests]


def test_an_adaptive_engine_knows_what_other_draws_cost():
    model = tiny_model(3)
    config = EngineConfig(window=4, policy="adaptive", max_rows=2, max_tokens=64, block_tokens=4)
    engine = build_engine(model_from_transformers(model), config, eos_ids=[EOS], pad_id=PAD)
    assert isinstance(engine.policy, AdaptiveWindow)
    assert set(engine.policy._others) == {"drawn", "adjusted"}
    requests = [DecodeRequest((3 + i, 4), 30, SamplingParams(temperature=float(i % 2), seed=i)) for i in range(5)]
    results = engine.generate(requests)
    assert [list(result.token_ids) for result in results] == [autoregressive(model, r, [EOS]) for r in requests]
    assert engine.policy._greedy._seen_at.keys() | engine.policy._others["drawn"]._seen_at.keys()


def test_padding_in_a_captured_forward_changes_no_key_of_a_row():
    """Graphs read prompts in batches filled up with idle rows, padded further than the longest table reaches."""
    runner = make_engine(tiny_model(3), window=2, max_rows=4).runner
    state, starts, ends = runner.state, [0, 40], [11, 50]
    state.tokens_RL[:2] = torch.arange(2 * state.tokens_RL.shape[1]).view(2, -1) % 19 + 3
    state.tables_RM[:2] = 1 + torch.arange(2 * state.tables_RM.shape[1]).view(2, -1)
    found = []
    for idle, width in ((0, 12), (2, 96)):
        runner._store_CZKD.zero_()
        slots_B = torch.tensor([0, 1] + [state.idle_slot] * idle)
        num_blocks = state.tables_RM.shape[1] + -(-width // runner.block_tokens)
        runner.read(slots_B, torch.tensor(starts + [0] * idle), width, num_blocks)
        places = [
            int(state.tables_RM[slot, position // 4]) * 4 + position % 4
            for slot in (0, 1)
            for position in range(starts[slot], ends[slot])
        ]
        found.append(runner._store_CZKD[:, places].clone())
    assert found[0].abs().amin(dim=(0, 2, 3)).gt(0).all()
    torch.testing.assert_close(found[1], found[0])


def test_every_group_of_prompt_pieces_has_a_captured_forward_or_none():
    for rows in range(1, 12):
        for width in range(16, 1300, 16):
            size = prompt_bucket(rows, width)
            if size is None:
                assert rows > 8 or width > 1024 or rows * width > 512, "small forwards are those that graphs are for"
                continue
            assert size[0] >= rows
            assert width <= size[1] <= width * 1.5 or width <= 64
            assert size in prompt_buckets(rows, width), "it would be captured while a request waits"


def test_no_forward_is_captured_that_cannot_come():
    assert prompt_buckets(1, 100) == [(1, 128), (1, 96), (1, 64), (1, 32), (1, 16)]


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({"window": 1, "max_rows": 6}, [1, 2, 4, 8]),
        ({"window": 8, "max_rows": 3}, [8, 16, 32]),
        ({"window": 4, "max_rows": 2, "policy": "adaptive"}, [1, 2, 4, 8]),
        ({"max_rows": 1, "lookahead": {"window": 2, "ngram": 3, "candidates": 1}}, [6]),
    ],
)
def test_launches_are_measured_for_the_steps_that_may_come(settings, sizes):
    assert step_sizes(EngineConfig.model_validate(settings)) == sizes


def test_an_engine_that_has_nothing_to_tune_works_as_ever():
    model, request = tiny_model(3), DecodeRequest((3, 4), 20)
    config = EngineConfig(window=4, max_rows=2, max_tokens=64, block_tokens=4, tune=True)
    (result,) = build_engine(model_from_transformers(model), config, eos_ids=[EOS], pad_id=PAD).generate([request])
    assert list(result.token_ids) == autoregressive(model, request, [EOS])
