"""The command line of estimates, and the committed results as its source."""

import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest

from cllm.errors import InputError
from cllm.report.prices import price_of
from cllm.report.speeds import read_speeds
from jobs import estimate
from jobs.cli import EXIT_BAD_INPUT, main

SPEEDS = ["--collect-tokens-per-s", "1000", "--evaluate-tokens-per-s", "1000", "--timing-tokens-per-s", "50"]
MFU = ["--train-mfu", "0.3", "--parameters", "7e9"]
TRAINING = ["--train-tokens-per-s", "2000"]
RESULTS = Path(__file__).parents[2] / "results"
ENGINE = RESULTS / "engine-h200.json"  # rows of a 7B shape
SHAPE = "llama-2-7b"
SMALL = RESULTS / "engine-small-h200.json"
GSM8K = ["--recipe", "paper-gsm8k", "--instance", "p4d.24xlarge", "--response-tokens", "160"]


def run(*arguments: str) -> int:
    return main(estimate.run, estimate.__doc__, arguments, add_arguments=estimate.add_arguments)


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_hours_and_dollars_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--dollars-per-hour", "20", "--startup-minutes", "30", "--serve-tokens-per-s", "1000"]
    assert run(*GSM8K, *SPEEDS, *TRAINING, *arguments) == 0
    document = last_line(capsys)
    hours = {stage["stage"]: stage["hours"] for stage in document["stages"]}
    assert hours["collect"] == pytest.approx(7000 * 160 / (1000 * 4) / 3600)
    assert hours["train"] == pytest.approx(359 * 4 * 2048 / (2000 * 4) / 3600)
    assert hours["evaluate: time"] == pytest.approx(50 * 3 * 160 * 6 / 50 / 3600)
    assert hours["start-up"] == 0.5
    assert document["dollars"] == pytest.approx(20 * sum(hours.values()))
    assert document["price"]["source"] == "command line"
    assert document["serving"]["dollars_per_million_tokens"] == pytest.approx(20 / 28.8)


def test_a_machine_that_the_table_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    described = ["--instance", "mine", "--gpu", "B200", "--gpus-per-instance", "4", "--dollars-per-hour", "12"]
    assert run("--recipe", "paper-gsm8k", "--response-tokens", "160", *described, *SPEEDS, *TRAINING) == 0
    price = last_line(capsys)["price"]
    assert (price["instance"], price["gpu"], price["gpus"], price["dollars_per_hour"]) == ("mine", "B200", 4, 12.0)


def holds_speeds(path: Path) -> bool:
    """Whether it is of `jobs/evaluate.py`, `jobs/bench_engine.py` or `jobs/bench_distill.py`, by its rows' keys."""
    document = json.loads(path.read_text())
    rows = document.get("rows", [])
    timed = [row for row in rows if isinstance(row, dict) and {"tokens_per_s", "tpf"} <= row.keys()]
    return "collection" in document or any({"method", "decoder"} & row.keys() for row in timed)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_every_committed_result_is_read_or_refused(path: Path) -> None:
    price = price_of("p4d.24xlarge")
    if not holds_speeds(path):
        with pytest.raises(InputError):
            read_speeds(path, price, 1.0)
        return
    speeds = read_speeds(path, price, 1.0)
    document = json.loads(path.read_text())
    ours = [row for row in document.get("rows", []) if row.get("engine", "cllm") == "cllm"]
    assert len(speeds) == len(ours) + ("collection" in document)
    assert all(speed.model and math.isfinite(speed.rate.tokens_per_s) for speed in speeds)
    made_by = document["provenance"] if "provenance" in document else document["sources"][0]
    hardware = made_by["hardware"]
    device = (hardware["gpus"] or [hardware["cpu"]])[0]
    assert {speed.rate.source for speed in speeds} == {f"{path.name} on {device} × 1"}


def test_speeds_are_among_the_committed_results() -> None:
    assert {ENGINE.name, "demo-cpu.json"} <= {path.name for path in RESULTS.glob("*.json") if holds_speeds(path)}


def test_a_measured_speed_counts_as_assumed_on_another_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """The slowest of our rows of the 7B shape; the small model's rows, ten times as fast, and vLLM's are left out."""
    rows = [row for row in json.loads(ENGINE.read_text())["rows"] if row["engine"] == "cllm"]
    slowest = min(row["tokens_per_s"] for row in rows)
    source = ["--results", str(ENGINE), str(SMALL), "--results-model", SHAPE, "--speed-ratio", "0.5"]
    assert run(*GSM8K, *TRAINING, *source, *SPEEDS[:4]) == 0
    document = last_line(capsys)
    rates = {stage["stage"]: stage["rate"] for stage in document["stages"]}
    assert rates["evaluate: time"]["tokens_per_s"] == pytest.approx(slowest * 0.5)
    assert rates["evaluate: time"]["basis"] == "assumed"
    assert rates["evaluate: time"]["source"] == "engine-h200.json on NVIDIA H200 × 0.5"
    best = max(row["tokens_per_s"] for row in rows if row["decoder"] == "jacobi")
    assert document["serving"]["tokens_per_s"] == pytest.approx(best * 0.5)


def test_the_command_of_the_docstring_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(RESULTS.parent)
    _, _, rest = (estimate.__doc__ or "").partition("    python jobs/estimate.py ")
    command, _, _ = rest.partition("\n\n")
    assert run(*shlex.split(command.replace("\\\n", " "))) == 0
    assert last_line(capsys)["dollars"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*GSM8K, *SPEEDS], "training: no speed known; give --train-tokens-per-s, or --train-mfu and --parameters"),
        ([*GSM8K, *SPEEDS, "--train-mfu", "0.3"], "training: no speed known"),
        ([*GSM8K, *TRAINING], "collect: no speed in the results files; give --collect-tokens-per-s"),
        ([*GSM8K, *SPEEDS, *TRAINING, "--instance", "p9"], "--instance p9: no price known"),
        ([*GSM8K, *SPEEDS, *TRAINING, "--gpu", "A100"], "--gpu, --gpus-per-instance: describe a machine with"),
        ([*GSM8K, *SPEEDS, *TRAINING, "--dollars-per-hour", "0"], "--dollars-per-hour: must be positive"),
        ([*GSM8K, *SPEEDS, *TRAINING, "--speed-ratio", "-1"], "--speed-ratio: must be positive"),
        ([*GSM8K, *SPEEDS, *TRAINING, "--set", "collect.num_prompts=null"], "--prompts: the recipe collects from all"),
        ([*GSM8K, *SPEEDS, *TRAINING, "--results", "absent.json"], "absent.json: No such file or directory"),
        (
            [*GSM8K, *TRAINING, "--results", str(ENGINE), str(SMALL), "--speed-ratio", "1"],
            f"--results: the files have rows of several models; name one with --results-model: gsm8k-cllm; {SHAPE}",
        ),
        (
            [*GSM8K, *TRAINING, "--results", str(ENGINE), str(SMALL), "--speed-ratio", "1", "--results-model", "x"],
            f"--results-model x: no rows of it in the results files; there are: gsm8k-cllm; {SHAPE}",
        ),
        (
            [*GSM8K, *SPEEDS, *TRAINING, "--results-model", "x"],
            "--results-model x: no rows of it in the results files; there are: none",
        ),
        ([*GSM8K, "--recipe", "nosuch"], "--recipe nosuch: unknown"),
        (
            [*GSM8K, *SPEEDS, *MFU, "--set", "train.loss.states=guess", "--set", "train.loss.on_policy_iterations=2"],
            "--train-mfu: says nothing of the passes",
        ),
    ],
)
def test_unknown_input_is_one_line_and_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(*arguments) == EXIT_BAD_INPUT
    stderr = capsys.readouterr().err
    assert stderr.startswith(f"error: {message}")
    assert stderr.count("\n") == 1
