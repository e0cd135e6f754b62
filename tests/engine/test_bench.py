"""The benchmark's arithmetic."""

from dataclasses import replace

import pytest
import torch

from cllm.bench.agreement import compare, first_difference
from cllm.bench.bandwidth import weight_bytes, weight_bytes_of
from cllm.bench.closed_loop import closed_loop
from cllm.bench.engines import Case, Row, measure_ours, workload
from cllm.decoding.records import Commit, DecodeRequest, SamplingParams
from cllm.engine.weights import model_from_transformers
from cllm.report.engines import engines_table
from tests.engine.making import make_engine
from tests.fakes import EOS, PAD, tiny_model


class Scripted:
    """Every request commits two tokens a step and ends with its limit; a step takes 10 ms."""

    def __init__(self) -> None:
        self.left: dict[int, int] = {}
        self.added = self.most = 0
        self.time = 0.0

    def add(self, request: DecodeRequest) -> int:
        key, self.added = self.added, self.added + 1
        self.left[key] = request.max_new_tokens
        self.most = max(self.most, len(self.left))
        return key

    def step(self):
        self.time += 0.01
        commits = [Commit(key, (7,) * min(2, n), "length" if n <= 2 else None) for key, n in self.left.items()]
        self.left = {key: n - 2 for key, n in self.left.items() if n > 2}
        return commits


def test_closed_loop_keeps_its_concurrency_and_counts():
    server = Scripted()
    load = closed_loop(server, [DecodeRequest((3,), 5)] * 6, 2, clock=lambda: server.time)
    assert server.most == 2
    assert (load.tokens, load.advances) == (30, 18)
    assert load.seconds == pytest.approx(0.09)
    assert load.tokens_per_s == pytest.approx(30 / 0.09)
    assert load.step_ms == pytest.approx(10)


def test_our_engine_under_load_gives_all_tokens():
    requests = [DecodeRequest((3 + i, 4), 10, SamplingParams(ignore_eos=True)) for i in range(7)]
    load = closed_loop(make_engine(tiny_model(2), window=4, overlap=True), requests, 3)
    assert load.tokens == 70
    assert load.step_ms is not None


def test_rows_and_table():
    model = model_from_transformers(tiny_model(1))
    cases = [Case("ar", 1, 2), Case("jacobi-block", 4, 2), Case("jacobi-adaptive", 4, 2)]
    requests = [DecodeRequest((3, 4), 8, SamplingParams(ignore_eos=True))]
    rows = list(measure_ours(model, "tiny", cases, requests, eos_ids=[EOS], pad_id=PAD, guess="pad", floor_ms=1.0))
    assert [(row.decoder, row.n, row.concurrency) for row in rows] == [(c.decoder, c.n, c.concurrency) for c in cases]
    assert rows[0].tpf == 1
    assert min(row.tokens_per_s for row in rows) > 0
    lines = engines_table([row.document() for row in rows]).splitlines()
    assert len(lines) == 5
    assert all(line.count("|") == 13 for line in lines)
    assert rows[0].steps_per_s == pytest.approx(1000 / rows[0].step_ms)
    assert cases[1].step_tokens == 8
    assert Case("jacobi", 5, 12).step_tokens == 5 * 16  # graphs fill up the batch


def test_floor_counts_every_matrix_once():
    model = tiny_model(0)
    expected = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    assert weight_bytes(model_from_transformers(model)) == 4 * expected
    assert weight_bytes_of(model.config) == 2 * expected


def test_workload_is_twice_the_concurrency():
    requests = [DecodeRequest((i + 3,), 4) for i in range(40)]
    assert workload(requests[:3], 1) == requests[:3]
    assert workload(requests, 1) == requests[:8]
    assert workload(requests[:3], 4) == [*requests[:3], *requests[:3], *requests[:2]]


def test_row_of_a_load_without_full_steps():
    load = closed_loop(make_engine(tiny_model(2), window=4), [DecodeRequest((3,), 2)], 2)
    names = {"engine": "cllm", "decoder": "ar", "model": "tiny", "concurrency": 2, "n": 1}
    row = Row.of(load, floor_ms=1.0, memory_gib=None, **names)
    assert row.step_ms is None
    assert row.floor_ratio is None
    assert torch.isfinite(torch.tensor(row.tokens_per_s))


def test_first_difference():
    assert first_difference((1, 2, 3), (1, 2, 3)) is None
    assert first_difference((1, 2, 3), (1, 5, 3)) == 1
    assert first_difference((1, 2, 3), (1, 2)) == 2


def test_agreement_rates_the_first_difference():
    model = tiny_model(2)
    engine = make_engine(model, window=1)
    requests = [DecodeRequest((3 + i, 4), 12) for i in range(3)]
    results = engine.generate(requests)
    assert compare(engine, requests, results, results).identical == 1
    tokens = list(results[1].token_ids)
    tokens[0] = 23 if tokens[0] != 23 else 22
    other = [results[0], replace(results[1], token_ids=tuple(tokens)), results[2]]
    agreement = compare(engine, requests, results, other)
    with torch.no_grad():
        top = model(torch.tensor([requests[1].prompt_ids])).logits[0, -1].topk(2).values
    assert agreement.identical == pytest.approx(2 / 3)
    assert agreement.margins == (pytest.approx(float(top[0] - top[1]), abs=1e-4),)
