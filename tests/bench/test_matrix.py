"""From a matrix recipe to cells, and what is said about cells that cannot run."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from cllm.bench.matrices import MATRICES, get_matrix
from cllm.bench.matrix import Cell, MatrixRecipe, Platform
from cllm.bench.methods import JacobiMethod, TransformersMethod, VllmMethod
from cllm.bench.plan import plan
from cllm.errors import InputError
from cllm.layout import RunLayout
from cllm.recipe import Recipe
from tests.bench.records import AR, BLOCK, make_cell
from tests.bench.runs import matrix_over

PLATFORM = Platform(device="cpu", threads=1, versions={"torch": "2.13", "vllm": "0.29"})


def test_a_key_survives_json():
    cell = make_cell(JacobiMethod(window=8, ngram=3))
    assert Cell.model_validate_json(cell.model_dump_json()).key == cell.key
    assert json.loads(cell.model_dump_json())["method"]["kind"] == "jacobi"


@pytest.fixture
def matrix(tiny_run: Recipe, tmp_path: Path) -> MatrixRecipe:
    return matrix_over(tiny_run, tmp_path / "results", methods=[AR, BLOCK, TransformersMethod()])


def test_cells_are_the_product_and_have_distinct_keys(matrix: MatrixRecipe):
    found = plan(matrix, PLATFORM)
    loads = [(cell.method.kind, cell.concurrency) for cell in found.cells if cell.model == "cllm"]
    assert loads == [("ar", 2), ("ar", 1), ("jacobi", 2), ("jacobi", 1), ("transformers", 1)]
    assert len({cell.key for cell in found.cells}) == len(found.cells) == 2 * 5
    assert [cell.key for cell in plan(matrix, PLATFORM).cells] == [cell.key for cell in found.cells]


def test_cells_of_a_model_follow_each_other(matrix: MatrixRecipe):
    models = [cell.model for cell in plan(matrix, PLATFORM).cells]
    assert models == ["teacher"] * 5 + ["cllm"] * 5


def test_installing_vllm_leaves_other_cells_alone(matrix: MatrixRecipe):
    without = PLATFORM.model_copy(update={"versions": {"torch": "2.13"}})
    assert [c.key for c in plan(matrix, PLATFORM).cells] == [c.key for c in plan(matrix, without).cells]


def test_what_cannot_run_is_listed_with_its_reason(matrix: MatrixRecipe):
    reasons = [str(obstacle) for obstacle in plan(matrix, PLATFORM).cannot_run]
    title = TransformersMethod().label
    assert reasons == [f"debug {model} {title} c=2: decodes one request at a time" for model in ("teacher", "cllm")]


def test_a_method_that_is_not_installed(tiny_run: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # what Python takes for a package that is not there
    found = plan(matrix_over(tiny_run, tmp_path, methods=[AR, VllmMethod()]), PLATFORM)
    assert {cell.method.kind for cell in found.cells} == {"ar"}
    assert [obstacle.method for obstacle in found.cannot_run] == ["vllm ar"] * 2
    assert "vLLM is not installed" in found.cannot_run[0].why


@pytest.mark.parametrize(
    ("gone", "model", "reason"),
    [
        ("student", "cllm", "no weights (*.safetensors); run jobs/pipeline.py"),
        ("student/model.safetensors", "cllm", "no weights"),
        ("prompts/prompts.parquet", None, "not a readable parquet file"),
    ],
)
def test_missing_models_and_data(tiny_run: Recipe, tmp_path: Path, gone: str, model: str | None, reason: str):
    root = tmp_path / "run"
    shutil.copytree(RunLayout.of(tiny_run).root, root)
    (shutil.rmtree if (root / gone).is_dir() else Path.unlink)(root / gone)  # type: ignore[operator]
    moved = tiny_run.model_copy(update={"output": str(root)})
    found = plan(matrix_over(moved, tmp_path / "results", concurrencies=[1]), PLATFORM)
    (obstacle,) = found.cannot_run
    assert (obstacle.model, obstacle.method) == (model, None)
    assert reason in obstacle.why
    assert {cell.model for cell in found.cells} == ({"teacher"} if model else set())


def test_perplexity_belongs_to_ar_with_one_request(tiny_run: Recipe, tmp_path: Path):
    (tmp_path / "test.txt").write_text("a b c")
    corpora = [{"name": "here", "path": str(tmp_path)}, {"name": "ptb", "path": str(tmp_path / "absent")}]
    found = plan(matrix_over(tiny_run, tmp_path / "results", corpora=corpora, methods=[AR, BLOCK]), PLATFORM)
    with_corpora = {(c.method.kind, c.concurrency): c.corpora for c in found.cells if c.corpora}
    # The tiny model reads 512 tokens, so the window shrinks.
    assert with_corpora.keys() == {("ar", 1)}
    ((corpus,),) = with_corpora.values()
    assert (corpus.name, corpus.context, corpus.stride) == ("here", 512, 256)
    assert found.cannot_run == ()
    (reason,) = found.left_out
    assert "perplexity on ptb" in str(reason)
    assert "no such file or folder" in str(reason)


def test_some_methods_are_measured_in_crowds(tiny_run: Recipe, tmp_path: Path):
    crowds = [{"concurrency": 8, "methods": ["ar"]}]
    found = plan(matrix_over(tiny_run, tmp_path, crowds=crowds, methods=[AR, BLOCK], concurrencies=[1]), PLATFORM)
    loads = [(c.method.kind, c.concurrency) for c in found.cells if c.model == "teacher"]
    assert loads == [("ar", 8), ("ar", 1), ("jacobi", 1)]


def test_a_draft_that_was_not_trained_is_an_obstacle(tiny_run: Recipe, tmp_path: Path):
    methods = [AR, {"kind": "vllm", "method": "draft_model", "draft": "run"}]
    found = plan(matrix_over(tiny_run, tmp_path, methods=methods), PLATFORM)
    assert {cell.method.kind for cell in found.cells} == {"ar"}
    assert all("run jobs/baselines.py" in obstacle.why for obstacle in found.cannot_run)


def test_sampling_is_for_our_engine_alone(tiny_run: Recipe, tmp_path: Path):
    load = {"num_prompts": 4, "temperature": 0.8, "max_new_tokens": 8}
    methods = [AR, {"kind": "transformers"}]
    found = plan(matrix_over(tiny_run, tmp_path, load=load, methods=methods, concurrencies=[1]), PLATFORM)
    assert {cell.method.kind for cell in found.cells} == {"ar"}
    assert "another noise" in found.cannot_run[0].why


def test_a_prompt_that_no_model_reads_is_no_fault_of_the_pipeline(tiny_run: Recipe, tmp_path: Path):
    load = {"num_prompts": 4, "max_new_tokens": 4000}
    found = plan(matrix_over(tiny_run, tmp_path, load=load), PLATFORM)
    assert [obstacle.model for obstacle in found.cannot_run] == ["teacher", "cllm"]
    assert all("max_position_embeddings=512" in obstacle.why for obstacle in found.cannot_run)
    assert not any("jobs/pipeline.py" in obstacle.why for obstacle in found.cannot_run)


def test_a_model_over_more_gpus_than_there_are(tiny_run: Recipe, tmp_path: Path):
    found = plan(matrix_over(tiny_run, tmp_path, methods=[AR, VllmMethod(gpus=2)], gpus=1), PLATFORM)
    assert {cell.method.kind for cell in found.cells} == {"ar"}
    assert found.cannot_run[0].why == "its model is spread over 2 GPUs, the matrix has gpus=1"
    assert found.cannot_run[0].method == "vllm ar on 2 GPUs"


def test_jacobi_in_vllm_guesses_as_the_small_runs_learnt_it():
    """Their students are trained on windows of padding tokens, and so are the rows of our own engine beside it."""
    for name in ("small", "peers"):
        matrix = get_matrix(name)
        (inside,) = [m for m in matrix.methods if isinstance(m, VllmMethod) and m.method == "jacobi"]
        assert inside.jacobi is not None
        guesses = {m.guess for m in matrix.methods if isinstance(m, JacobiMethod)}
        assert {inside.jacobi.guess} == guesses == {run.resolve().collect.guess for run in matrix.runs}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("speed=3", "unknown key 'speed'"),
        ("load.repeats=2", "a median and its spread take 3"),
        ("gpu_share=0.5", "timed cells share no GPU"),
        ('methods=[{"kind":"jacobi","ngram":1}]', "methods.0.jacobi.ngram"),
        ('methods=[{"kind":"vllm","method":"ngram","jacobi":{"guess":"pad"}}]', "options of method jacobi"),
        ("concurrencies=[1,1]", "concurrencies"),
        ("concurrencies=[0]", "at least 1"),
        ('methods=[{"kind":"beam"}]', "methods"),
        ('methods=[{"kind":"ar"},{"kind":"ar"}]', "twice"),
        ('methods=[{"kind":"jacobi","refill":"block","policy":"adaptive"}]', "refill block needs policy fixed"),
        ('methods=[{"kind":"lookahead","window":60,"candidates":60}]', "at most 256, got 480"),
        ('runs=[{"recipe":"demo","speed":1}]', "runs.0.speed"),
        ('crowds=[{"concurrency":8,"methods":["vllm ar"]}]', "no method 'vllm ar'"),
        ('crowds=[{"concurrency":2,"methods":["ar"]}]', "concurrencies: one of them stands there twice"),
        ('corpora=[{"name":"ptb","path":"x","stride":4096}]', "must be less than context"),
    ],
)
def test_bad_recipes_name_the_key(override: str, message: str):
    with pytest.raises(InputError, match=message) as error:
        get_matrix("debug").with_overrides([override])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", MATRICES)
def test_recipes_by_name_resolve(name: str):
    matrix = get_matrix(name)
    assert matrix.name == name
    assert all(run.resolve().output for run in matrix.runs)


def test_the_demo_matrix_is_large_enough():
    matrix = get_matrix("demo")
    assert len(matrix.methods) >= 6
    assert (matrix.models, matrix.concurrencies) == (("teacher", "cllm"), (1, 4))


def test_the_peers_are_measured_at_growing_loads():
    matrix = get_matrix("peers")
    loads = {method.label: sorted(matrix.concurrencies_of(method)) for method in matrix.methods}
    assert loads.pop("ar") == loads["vllm ar"] == loads["vllm jacobi k=15"] == [1, 8, 32, 128]
    assert loads["vllm draft_model k=5"] == loads["vllm medusa k=4"] == [1, 8, 32]


def test_unknown_names():
    with pytest.raises(InputError, match="--matrix nosuch: unknown; known are demo"):
        get_matrix("nosuch")
