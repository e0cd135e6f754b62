"""Cells measured on tiny models: all methods give AR's tokens, and the loop's figures are those of its clock."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from cllm.bench.matrix import Cell, MatrixRecipe, Platform
from cllm.bench.measure import Workbench
from cllm.bench.methods import JacobiMethod, TransformersMethod
from cllm.bench.one_by_one import OneByOne
from cllm.bench.plan import plan
from cllm.bench.result import CellResult
from cllm.bench.served import percentile, serve
from cllm.decoding.records import Commit, DecodeRequest
from cllm.layout import RunLayout
from cllm.models import load_model
from cllm.recipe import Recipe
from tests.bench.runs import matrix_over

PLATFORM = Platform(device="cpu", threads=1, versions={})


class Scripted:
    """Every request commits two tokens a step and ends with its limit; a step takes 10 ms."""

    def __init__(self) -> None:
        self.left: dict[int, int] = {}
        self.time = 0.0
        self.added = 0

    def add(self, request: DecodeRequest) -> int:
        self.added += 1
        self.left[self.added] = request.max_new_tokens
        return self.added

    def step(self) -> list[Commit]:
        self.time += 0.01
        commits = []
        for key, left in list(self.left.items()):
            count = min(2, left)
            self.left[key] = left - count
            if count == left:
                del self.left[key]
            commits.append(Commit(key, (key,) * count, "length" if count == left else None))
        return commits


def test_a_served_load_in_the_order_of_its_requests():
    decoder = Scripted()
    requests = [DecodeRequest((3,), count) for count in (5, 2, 4)]
    served = serve(decoder, requests, 2, clock=lambda: decoder.time)
    assert served.tokens == ((1,) * 5, (2,) * 2, (3,) * 4)
    assert served.forwards == (3, 1, 2)
    # The second ends after one step, so the third starts then: steps 1-3, step 1, steps 2-3.
    assert served.seconds == pytest.approx((0.03, 0.01, 0.02))
    assert served.load.tokens_per_s == pytest.approx(11 / 0.03)
    assert served.load.tokens_per_forward == pytest.approx(11 / 6)


def test_loads_one_after_the_other_add_up():
    decoder = Scripted()
    one, two = (serve(decoder, [DecodeRequest((3,), count)], 1, clock=lambda: decoder.time) for count in (5, 2))
    both = one + two
    assert (both.tokens, both.forwards) == ((*one.tokens, *two.tokens), (3, 1))
    assert both.seconds == pytest.approx((0.03, 0.01))
    assert both.load.tokens_per_s == pytest.approx(7 / 0.04)
    assert both.load.tokens_per_forward == pytest.approx(7 / 4)


def test_percentiles_by_nearest_rank():
    values = [float(value) for value in (50, 10, 40, 20, 30)]
    assert [percentile(values, p) for p in (1, 20, 50, 90, 99, 100)] == [10, 10, 30, 50, 50, 50]
    assert percentile([7.0], 50) == 7


def test_one_request_after_the_other():
    def stream(request: DecodeRequest):
        yield [Commit(0, (1,))]
        yield [Commit(0, (2,)), Commit(0, (3,), "stop")]

    decoder = OneByOne(stream)
    keys = [decoder.add(DecodeRequest((5,), 3)) for _ in range(2)]
    commits = [commit for _ in range(4) for commit in decoder.step()]
    assert [commit.row for commit in commits] == [keys[0]] * 3 + [keys[1]] * 3


@pytest.fixture(scope="module")
def measured(tiny_run: Recipe, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Cell, CellResult]]:
    folder = tmp_path_factory.mktemp("results")
    (folder / "test.txt").write_text("list the names of nurses\n" * 30)
    corpora = [{"name": "here", "path": str(folder), "context": 64, "stride": 32}]
    matrix: MatrixRecipe = matrix_over(tiny_run, folder / "results", corpora=corpora)
    adaptive = matrix.methods[2].model_copy(update={"policy": "adaptive"})
    ngram = matrix.methods[2].model_copy(update={"ngram": 2})
    matrix = matrix.model_copy(update={"methods": (*matrix.methods, adaptive, ngram, TransformersMethod())})
    found, bench = plan(matrix, PLATFORM), Workbench()
    return [(cell, bench.measure(cell, found.runs[cell.run_key])) for cell in found.cells]


def test_every_method_gives_the_tokens_of_ar(measured: list[tuple[Cell, CellResult]]):
    digests: dict[str, set[tuple[str, ...]]] = {}
    for cell, result in measured:
        digests.setdefault(cell.model, set()).add(result.response_digests)
    assert {model: len(found) for model, found in digests.items()} == {"teacher": 1, "cllm": 1}
    assert digests["teacher"] != digests["cllm"]


def test_figures_are_complete(measured: list[tuple[Cell, CellResult]]):
    assert len(measured) == 2 * (2 * 6 + 1)
    for cell, result in measured:
        assert len(result.tokens_per_s) == 3
        assert len(result.scores) == len(result.prompt_ids) == 4
        assert result.latency_ms["p50"] <= result.latency_ms["p90"] <= result.latency_ms["p99"]
        assert (result.reference_perplexity is not None) == (cell.method.kind == "ar")
        assert (result.fast_forwarded is not None) == cell.method.label.startswith("jacobi-block")
        assert (result.perplexity.keys() == result.word_perplexity.keys() == {"here"}) == bool(cell.corpora)
        assert (result.trained_parameters, result.energy_j) == (0 if cell.model == "teacher" else result.parameters, ())
        assert (result.categories, result.responses) == ((), ())
        assert sum(result.response_tokens) / sum(result.response_forwards) == pytest.approx(result.tpf)


def test_what_served_is_in_every_result(measured: list[tuple[Cell, CellResult]]):
    for cell, result in measured:
        engine = result.engine
        assert engine is not None
        assert engine.package == ("transformers" if cell.method.kind == "transformers" else "cllm")
        assert (engine.runner, engine.scheduling) == (None, "sync")  # the engine overlaps steps on GPUs
        if isinstance(cell.method, JacobiMethod) and cell.method.policy == "fixed":  # else AR steps are not counted
            # Of this cell alone: an engine serves the next one as well. A row-step commits what held, and one more.
            answered = 4 + 3 * cell.load.timed_prompts(cell.concurrency)  # once, and these in each repeat
            assert engine.steps is not None
            assert engine.accepted is not None
            assert answered * 1 <= engine.steps <= answered * 12
            assert engine.accepted + engine.steps == sum(result.response_tokens) + 3 * timed_tokens(cell, result)
            assert engine.accepted_at is not None
            assert sum(engine.accepted_at) == engine.accepted
        assert (result.step_ms is None) == (cell.method.kind == "transformers")  # `generate` tells no steps
        assert result.memory_gib is not None


def timed_tokens(cell: Cell, result: CellResult) -> int:
    return sum(result.response_tokens[: cell.load.timed_prompts(cell.concurrency)])


def test_the_floor_is_measured_while_no_decoder_takes_memory(tiny_run: Recipe, tmp_path: Path):
    open_then: list[bool] = []

    def bandwidth(device: torch.device) -> float:
        open_then.append(bench.shelf._open is not None)
        return 1e9

    matrix = matrix_over(tiny_run, tmp_path, methods=[{"kind": "ar"}], models=["teacher"])
    found, bench = plan(matrix, PLATFORM), Workbench(bandwidth)
    results = [bench.measure(cell, found.runs[cell.run_key]) for cell in found.cells]
    assert open_then == [False]
    weights = load_model(str(RunLayout.of(tiny_run).finetuned))
    matrices = sum(p.numel() for name, p in weights.named_parameters() if p.ndim == 2 and "embed" not in name)
    head = weights.get_input_embeddings().weight.numel()  # tied: read once, as the last projection
    assert {result.floor_ms for result in results} == {1000 * 4 * (matrices + head) / 1e9}


def test_without_timing_there_are_answers_and_scores(tiny_run: Recipe, tmp_path: Path):
    def bandwidth(device: torch.device) -> float:
        raise AssertionError("nothing is to be timed")

    load = {"num_prompts": 4, "repeats": 0, "max_new_tokens": 12}
    changed = {"methods": [{"kind": "ar"}], "models": ["teacher"], "concurrencies": [2], "load": load}
    found, bench = plan(matrix_over(tiny_run, tmp_path, **changed), PLATFORM), Workbench(bandwidth)
    (cell,) = found.cells
    result = bench.measure(cell, found.runs[cell.run_key])
    assert (result.tokens_per_s, result.latency_ms, result.step_ms, result.floor_ms) == ((), {}, None, 0)
    assert len(result.scores) == len(result.response_digests) == 4


def test_generate_does_not_take_the_checkpoints_penalties(tiny_run: Recipe, tmp_path: Path):
    """As Qwen's chat models have them; no other method does."""
    shutil.copytree(RunLayout.of(tiny_run).root, tmp_path / "run")
    moved = tiny_run.model_copy(update={"output": str(tmp_path / "run")})
    path = RunLayout.of(moved).finetuned / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"repetition_penalty": 1.9, "no_repeat_ngram_size": 2}))
    changed = {"methods": [{"kind": "ar"}, {"kind": "transformers"}], "models": ["teacher"], "concurrencies": [1]}
    found, bench = plan(matrix_over(moved, tmp_path / "results", **changed), PLATFORM), Workbench(lambda _: 1e9)
    ar, generate = (bench.measure(cell, found.runs[cell.run_key]) for cell in found.cells)
    assert generate.response_digests == ar.response_digests


def test_tokens_per_forward(measured: list[tuple[Cell, CellResult]]):
    for cell, result in measured:
        if cell.method.kind in ("ar", "transformers"):
            assert result.tpf == 1
        if result.fast_forwarded is not None:
            # Recorded blocks commit what the timed ones do.
            assert result.tpf == pytest.approx(result.fast_forwarded)
