"""Tables, steps and the plot, from a document by hand."""

from pathlib import Path
from typing import Any

import pytest

from cllm.report.markdown import report, results_table, results_text
from cllm.report.plot import plot_acceptance
from cllm.report.steps import coloured_step, marked_steps, step_example, step_texts
from cllm.tasks.tokenizer import train_tokenizer


def row(model: str, method: str, **changes: Any) -> dict[str, Any]:
    jacobi = method != "ar"
    figures: dict[str, Any] = {
        "model": model,
        "method": method,
        "block_size": 16 if jacobi else 1,
        "num_prompts": 200,
        "accuracy": 0.5,
        "ci95": [0.4313, 0.5687],
        "tpf": 2.5 if jacobi else 1.0,
        "tokens_per_s": 1234.5,
        "tokens_per_s_spread": [1200.0, 1300.0],
        "speedup_over_ar": 2.0 if jacobi else 1.0,
        "identical_to_ar": 1.0,
        "perplexity": 1.2345,
        "fast_forwarded": 2.5 if method == "jacobi-block" else None,
        "stationary": 0.75 if method == "jacobi-block" else None,
        "step_histogram": {"1": 30, "4": 10, "16": 1} if jacobi else {"1": 86},
        "mean_response_tokens": 30.0,
    }
    return figures | changes


@pytest.fixture
def results() -> dict[str, Any]:
    return {
        "task": "spider",
        "metric": "execution accuracy",
        "num_prompts": 200,
        "num_timed_prompts": 50,
        "rows": [
            row(model, method) for model in ("teacher", "cllm") for method in ("ar", "jacobi-block", "jacobi-sliding")
        ],
        "cllm_minus_teacher": {"difference": -0.015, "ci95": [-0.04, 0.01]},
        "agreement_with_teacher": 0.91,
        "recipe": {"name": "demo", "evaluate": {"speed_repeats": 3}},
        "speed_hardware": {"gpus": [], "cpu": "Some CPU", "threads": 2},
        "provenance": {"commit": "abc", "versions": {"torch": "2.13.0"}, "time": "2026-01-01T00:00:00+00:00"},
    }


def test_table_lines(results: dict[str, Any]) -> None:
    lines = results_table(results).splitlines()
    assert len(lines) == 8
    assert lines[2] == ("| teacher | ar | 50.0% (43.1 to 56.9) | 1.00 | 1,234 | 1.00 | 100.0% | – | – | 1.23 | 30.0 |")
    assert lines[6] == (
        "| cllm | jacobi-block n=16 | 50.0% (43.1 to 56.9) | 2.50 | 1,234 | 2.00 | 100.0% | 2.50 | 0.75 | 1.23 | 30.0 |"
    )
    assert {line.count("|") for line in lines} == {12}


def test_unusable_perplexity_is_a_dash_and_a_huge_one_short(results: dict[str, Any]) -> None:
    results["rows"] = [row("cllm", "ar", perplexity=None), row("cllm", "ar", perplexity=3.2e20)]
    lines = results_table(results).splitlines()
    assert lines[2].endswith("| – | – | – | 30.0 |")
    assert lines[3].endswith("| 3.20e+20 | 30.0 |")


def test_text_compares_the_models_and_names_the_machine(results: dict[str, Any]) -> None:
    text = results_text(results)
    assert "paired: -1.5 points (95% CI -4.0 to +1.0)" in text
    assert "same token for token on 91.0% of the prompts" in text
    assert "50 prompts one at a time" in text
    assert "on Some CPU (threads: 2); median of 3 repeats" in text
    results["speed_hardware"]["gpus"] = ["NVIDIA A100"] * 8
    assert "on NVIDIA A100; median" in results_text(results)


def test_page_has_the_plot_the_examples_and_the_provenance(results: dict[str, Any]) -> None:
    page = report(results, ["SELECT | name"], "plot.svg")
    assert page.startswith("# Evaluation of demo\n")
    assert "(plot.svg)" in page
    assert "```\nSELECT | name\n```" in page
    assert "Commit abc; torch 2.13.0" in page


def test_plot_is_the_same_bytes_again(results: dict[str, Any], tmp_path: Path) -> None:
    plot_acceptance(results, tmp_path / "a.svg")
    plot_acceptance(results, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")


def test_steps_join_to_the_response_even_inside_a_character() -> None:
    tokenizer = train_tokenizer(["SELECT name FROM nurse"], 300)
    ids = [*tokenizer.encode("SELECT name = 'é'", add_special_tokens=False), tokenizer.eos_token_id]
    texts = step_texts(tokenizer, ids, [1] * len(ids))
    assert len(texts) == len(ids)
    assert "".join(texts) == "SELECT name = 'é'<|eos|>"
    assert "\ufffd" not in "".join(texts)
    assert step_texts(tokenizer, ids, [len(ids) - 1, 1])[1] == "<|eos|>"


def test_steps_are_told_apart() -> None:
    texts = ["SELECT name,", " age", "\nFROM nurse"]
    assert marked_steps(texts) == "SELECT name, | age | ↵FROM nurse"
    first, second, third = (coloured_step(number, text) for number, text in enumerate(texts))
    assert (first[:5], second[:5], third[:5]) == ("\033[96m", "\033[93m", "\033[96m")
    assert all(step.endswith("\033[0m") for step in (first, second, third))
    shown = step_example("schema\nhow old?", texts, 9)
    assert shown == "… schema how old?\nSELECT name, | age | ↵FROM nurse\n  3 forward passes; AR takes 9"
