"""Results of a matrix by hand in which every section of the report has something to show."""

from typing import Any

from cllm.bench.matrix import Obstacle, Platform
from cllm.bench.matrix_results import CellRecord, MatrixResults
from cllm.bench.methods import LookaheadMethod, MethodConfig, TransformersMethod, VllmMethod
from tests.bench.records import AR, BLOCK, VLLM, failed_record, make_cell, make_record, make_result, make_results

GPU = Platform(device="Test GPU", threads=0, versions={})
DRAFT = VllmMethod(method="draft_model", draft="run")
# Tokens a second, one and eight requests in flight.
SPEEDS: dict[tuple[str, MethodConfig], tuple[float, float]] = {
    ("teacher", AR): (100, 800),
    ("teacher", BLOCK): (105, 700),
    ("teacher", VLLM): (80, 640),
    ("teacher", DRAFT): (160, 960),
    ("cllm", AR): (100, 800),
    ("cllm", BLOCK): (350, 1600),
    ("cllm", VLLM): (80, 640),
}


def spider_results() -> MatrixResults:
    """A run on Spider; of its cells one failed, one entry cannot run, and one prompt was left out."""
    records = [
        record(model, method, concurrency, speed)
        for (model, method), speeds in SPEEDS.items()
        for concurrency, speed in zip((1, 8), speeds, strict=True)
    ]
    return make_results(
        *records,
        record("teacher", TransformersMethod(), 1, 50),
        failed_record(cell("teacher", LookaheadMethod(), 1), "<script>out of memory</script>"),
        cannot_run=(Obstacle(run="gsm8k-small", model="cllm", why="no weights"),),
        left_out=(Obstacle(run="spider-small", why="1 of 5 prompts: longer than the model reads"),),
    )


def cell(model: str, method: MethodConfig, concurrency: int, **changed: Any):
    fields = {"run": "spider-small", "task": "spider", "platform": GPU, "model": model, "concurrency": concurrency}
    return make_cell(method, **fields | changed)


def record(model: str, method: MethodConfig, concurrency: int, speed: float, **changed: Any) -> CellRecord:
    """Repeats 10% apart; a CLLM that takes a quarter of AR's forwards with the teacher's accuracy."""
    fields: dict[str, Any] = {
        "energy_j": (40 / speed, 50 / speed, 60 / speed),
        "categories": ("math", "math", "qa", "qa"),
        "trained_parameters": 500_000 if method == DRAFT else 1_900_000 if model == "cllm" else 0,
    }
    if method == BLOCK:
        fields |= {"fast_forwarded": 1.1, "stationary": 0.5}
    if (model, method) == ("cllm", BLOCK):
        fields |= {"tpf": 3.5, "fast_forwarded": 3.3, "stationary": 2.0, "response_forwards": (2, 2, 2, 2)}
    if method == AR and concurrency == 1:
        fields |= {"reference_perplexity": 1.25, "perplexity": {"ptb": 40.125}, "word_perplexity": {"ptb": 1234.5}}
    result = make_result((0.9 * speed, 1.0 * speed, 1.1 * speed), **fields | changed)
    return make_record(cell(model, method, concurrency), result)
