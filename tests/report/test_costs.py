"""Estimates against calculations by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from cllm.errors import InputError
from cllm.recipes import get_recipe
from cllm.report.costs import (
    Rates,
    StageCost,
    Work,
    costs_document,
    costs_table,
    dollars_per_million_tokens,
    estimate,
    stage_cost,
    stages_of,
    train_rate,
)
from cllm.report.prices import PRICES, Price, price_of
from cllm.report.speeds import (
    Rate,
    Speed,
    collection_rate,
    evaluation_rate,
    read_speeds,
    serving_rate,
    timing_rate,
)

EIGHT = Price("eight", "A100", 8, 20.0, "a list", "2026-01-01")
MACHINE = Price("machine", None, 0, 0.5, "a list", "2026-01-01")


def rate(tokens_per_s: float) -> Rate:
    return Rate(tokens_per_s, "assumed", "the test")


RATES = Rates(train=rate(2000), collect=rate(1000), evaluate=rate(500), timing=rate(50))


def test_a_stage_by_hand() -> None:
    """7.2 million tokens at 500 tokens/s on each of 4 GPUs: 3,600 s; one machine of eight GPUs is paid whole."""
    cost = stage_cost(Work("collect", 7_200_000, 4, rate(500)), EIGHT)
    assert (cost.hours, cost.instances, cost.dollars) == (1.0, 1, 20.0)


def test_a_ninth_gpu_is_a_second_machine() -> None:
    cost = stage_cost(Work("train", 7_200_000, 9, rate(500)), EIGHT)
    assert cost.instances == 2
    assert cost.dollars == pytest.approx(7_200_000 / (500 * 9) / 3600 * 2 * 20)


def test_a_machine_without_gpus_is_counted_itself() -> None:
    cost = stage_cost(Work("train", 3600 * 100, 1, rate(100)), MACHINE)
    assert (cost.hours, cost.instances, cost.dollars) == (1.0, 1, 0.5)


def test_tokens_of_a_recipe_by_hand() -> None:
    recipe = get_recipe("paper-gsm8k")
    stages = {work.stage: work for work in stages_of(recipe, RATES, response_tokens=160)}
    assert list(stages) == ["collect", "train", "evaluate: decode", "evaluate: time"]
    assert stages["collect"].tokens == 7_000 * 160
    assert recipe.train.optim.steps == 359  # 7,000 × (100 + 2 × 160) tokens in steps of 4 × 2,048
    assert stages["train"].tokens == 359 * 4 * 2048
    assert stages["evaluate: decode"].tokens == 1_319 * 160 * 6  # two models, three decoders
    assert stages["evaluate: time"].tokens == 50 * 3 * 160 * 6
    assert [work.devices for work in stages.values()] == [4, 4, 4, 1]


def test_a_recipe_that_fine_tunes_trains_twice() -> None:
    recipe = get_recipe("paper-spider")
    first, *_ = stages_of(recipe, RATES, response_tokens=50)
    assert recipe.finetune is not None
    assert (first.stage, first.tokens, first.rate) == ("finetune", recipe.finetune.optim.steps * 4 * 2048, RATES.train)


def test_start_up_comes_first_and_the_head_node_runs_all_the_time() -> None:
    work = [Work("collect", 7_200_000, 4, rate(500)), Work("train", 14_400_000, 16, rate(500))]
    start, collect, train, head = estimate(work, EIGHT, startup_hours=0.25, head_dollars_per_hour=0.4)
    assert (start.hours, start.instances, start.dollars) == (0.25, 2, 10.0)
    assert (collect.hours, train.hours, train.dollars) == (1.0, 0.5, 20.0)
    assert head.dollars == pytest.approx(1.75 * 0.4)
    document = costs_document([start, collect, train, head], EIGHT)
    assert document["hours"] == 1.75
    assert document["dollars"] == pytest.approx(10 + 20 + 20 + 0.7)
    assert json.loads(json.dumps(document)) == document


def test_training_speed_by_hand() -> None:
    """312 TFLOP/s × 0.5 over 6 FLOPs for each of 2.6e9 parameters: 10,000 tokens a second."""
    found = train_rate(EIGHT, mfu=0.5, parameters=2.6e9)
    assert found.tokens_per_s == pytest.approx(10_000)
    assert found.basis == "assumed"


def test_serving_by_hand() -> None:
    """8 × 1,000 tokens/s are 28.8 million an hour for 20 dollars."""
    assert dollars_per_million_tokens(rate(1000), EIGHT) == pytest.approx(20 / 28.8)
    assert dollars_per_million_tokens(rate(1000), MACHINE) == pytest.approx(0.5 / 3.6)


def test_table_names_every_basis_and_the_price() -> None:
    work = [Work("collect", 7_200_000, 4, Rate(500, "measured", "x.json on NVIDIA A100"))]
    table = costs_table(estimate(work, EIGHT, startup_hours=0.5), EIGHT)
    assert table.splitlines()[2:] == [
        "| start-up |  | 4 |  | 1 | 0.50 | 10.00 |",
        "| collect | 7,200,000 | 4 | 500 | 1 | 1.00 | 20.00 |",
        "| sum |  |  |  |  | 1.50 | 30.00 |",
        "",
        "eight: $20.00 an hour, 8 × A100; a list, 2026-01-01",
        "- collect: measured (x.json on NVIDIA A100)",
    ]


def test_every_price_has_a_source_and_a_date() -> None:
    for name, price in PRICES.items():
        assert price_of(name) is price
        assert price.dollars_per_hour > 0
        assert price.source
        assert len(price.date.split("-")) == 3


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: price_of("p9.huge"), "--instance p9.huge: no price known; known are p4d.24xlarge"),
        (lambda: rate(0), "must be positive and finite, got 0 tokens/s"),
        (lambda: rate(float("nan")), "must be positive and finite"),
        (lambda: rate(float("inf")), "must be positive and finite"),
        (lambda: stages_of(get_recipe("paper-gsm8k"), RATES, response_tokens=0), "--response-tokens"),
        (lambda: stages_of(unlimited(), RATES, response_tokens=10), "--prompts"),
        (lambda: train_rate(EIGHT, mfu=1.5, parameters=1e9), "--train-mfu: must be above 0"),
        (lambda: train_rate(EIGHT, mfu=0.5, parameters=0), "--parameters"),
        (lambda: train_rate(MACHINE, mfu=0.5, parameters=1e9), "the peak of a CPU is not known"),
        (lambda: estimate([Work("x", 1, 1, rate(1))], EIGHT, startup_hours=-1), "--startup-minutes"),
    ],
)
def test_bad_input_is_named(act: Any, message: str) -> None:
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        act()


def unlimited() -> Any:
    return get_recipe("paper-gsm8k").with_overrides(["collect.num_prompts=null"])


def engine_row(decoder: str, concurrency: int, tokens_per_s: float, engine: str = "cllm") -> dict[str, Any]:
    names = {"engine": engine, "decoder": decoder, "model": "llama-2-7b", "concurrency": concurrency, "n": 16}
    return names | {"tokens_per_s": tokens_per_s, "tpf": 1.0}


@pytest.fixture
def engine_results(tmp_path: Path) -> Path:
    path = tmp_path / "engine.json"
    rows = [
        engine_row("ar", 1, 200.0),
        engine_row("jacobi", 1, 180.0),
        engine_row("ar", 32, 5000.0),
        engine_row("jacobi", 32, 6000.0),
        engine_row("jacobi-block", 8, 900.0),
        engine_row("jacobi-block", 32, 2000.0),
        engine_row("jacobi-block", 256, 2500.0),
        engine_row("ar", 32, 1.0, engine="vllm"),
    ]
    path.write_text(json.dumps({"rows": rows, "hardware": {"gpus": ["NVIDIA A100-SXM4-40GB"], "cpu": "x"}}))
    return path


def test_rows_of_the_engine_benchmark(engine_results: Path) -> None:
    speeds = read_speeds(engine_results, EIGHT, None)
    found = (collection_rate(speeds, 64), evaluation_rate(speeds, 64), timing_rate(speeds), serving_rate(speeds))
    assert [rate.tokens_per_s for rate in found if rate] == [2000.0, 2000.0, 180.0, 6000.0]
    assert {(rate.basis, rate.source) for rate in found if rate} == {
        ("measured", "engine.json on NVIDIA A100-SXM4-40GB")
    }


def test_speeds_of_another_gpu_need_a_ratio_and_are_assumed(engine_results: Path) -> None:
    other = Price("other", "H100", 8, 1.0, "a list", "2026-01-01")
    with pytest.raises(InputError, match="measured on NVIDIA A100-SXM4-40GB, other has H100; give --speed-ratio"):
        read_speeds(engine_results, other, None)
    found = timing_rate(read_speeds(engine_results, other, 2.0))
    assert found == Rate(360.0, "assumed", "engine.json on NVIDIA A100-SXM4-40GB × 2")


def test_an_evaluation_tells_the_speed_of_single_prompts_only() -> None:
    """The committed figures of the demo: one prompt at a time says nothing of a batch."""
    path = Path(__file__).parents[2] / "results" / "demo-cpu.json"
    speeds = read_speeds(path, MACHINE, None)
    rows = json.loads(path.read_text())["rows"]
    found = timing_rate(speeds)
    assert found is not None
    assert found.tokens_per_s == min(row["tokens_per_s"] for row in rows)
    assert collection_rate(speeds, 64) is None
    assert evaluation_rate(speeds, 64) is None
    (sliding,) = [row for row in rows if (row["model"], row["method"]) == ("cllm", "jacobi-sliding")]
    serving = serving_rate(speeds)
    assert serving is not None
    assert serving.tokens_per_s == sliding["tokens_per_s"]


def test_the_student_does_not_collect() -> None:
    speeds = [Speed("cllm", "jacobi-block", 8, rate(100)), Speed("teacher", "jacobi-block", 8, rate(300))]
    assert collection_rate(speeds, 8) == rate(300)


def test_the_distillation_benchmark_tells_the_speed_of_collection(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    batched = {"prompts": 150, "tokens_per_s": 4000.0, "spread": [1, 2]}
    document = {"collection": {"batched": batched}, "hardware": {"gpus": [], "cpu": "x"}}
    path.write_text(json.dumps(document))
    assert read_speeds(path, MACHINE, None) == [
        Speed("teacher", "jacobi-block", 150, Rate(4000.0, "measured", "bench.json on x"))
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a results file of this project"),
        ("{}", "does not say on what hardware"),
        ('{"hardware": {"gpus": [], "cpu": "x"}}', "not a results file of this project"),
        ('{"hardware": {"gpus": [], "cpu": "x"}, "rows": [{"method": "ar"}]}', "not a results file of this project"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_speeds(path, MACHINE, None)
    with pytest.raises(InputError, match="No such file"):
        read_speeds(tmp_path / "absent.json", MACHINE, None)


def test_costs_are_plain_records() -> None:
    assert stage_cost(Work("x", 3600, 1, rate(1)), MACHINE) == StageCost("x", 3600, 1, rate(1), 1, 1.0, 0.5)
