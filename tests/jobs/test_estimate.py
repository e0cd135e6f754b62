"""The command line of estimates."""

import json
from typing import Any

import pytest

from jobs import estimate
from jobs.cli import EXIT_BAD_INPUT, main

SPEEDS = ["--collect-tokens-per-s", "1000", "--evaluate-tokens-per-s", "1000", "--timing-tokens-per-s", "50"]
MFU = ["--train-mfu", "0.3", "--parameters", "7e9"]
TRAINING = ["--train-tokens-per-s", "2000"]
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
