"""Cells measured on tiny models: all methods give AR's tokens, and the loop's figures are those of its clock."""

import pytest

from cllm.bench.matrix import Cell, MatrixRecipe, Platform
from cllm.bench.matrix_results import CellResult
from cllm.bench.measure import Workbench
from cllm.bench.methods import OneByOne, TransformersMethod
from cllm.bench.plan import plan
from cllm.bench.served import percentile, serve
from cllm.decoding.records import Commit, DecodeRequest
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
    return [(c, CellResult.from_data(bench.measure(c, found.runs[c.run_key]), where=c.title)) for c in found.cells]


def test_every_method_gives_the_tokens_of_ar(measured: list[tuple[Cell, CellResult]]):
    digests: dict[str, set[tuple[str, ...]]] = {}
    for cell, result in measured:
        digests.setdefault(cell.model, set()).add(result.response_digests)
    assert {model: len(found) for model, found in digests.items()} == {"teacher": 1, "cllm": 1}
    assert digests["teacher"] != digests["cllm"]


def test_figures_are_complete(measured: list[tuple[Cell, CellResult]]):
    assert len(measured) == 2 * (2 * 5 + 2)
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


def test_tokens_per_forward(measured: list[tuple[Cell, CellResult]]):
    for cell, result in measured:
        if cell.method.kind in ("ar", "transformers"):
            assert result.tpf == 1
        if result.fast_forwarded is not None:
            # Recorded blocks commit what the timed ones do.
            assert result.tpf == pytest.approx(result.fast_forwarded)
