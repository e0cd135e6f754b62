"""An evaluation's results as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from cllm.report.tables import markdown_table

_NAMES = ("model", "decoding")
_FIGURES = (
    "accuracy (95% CI)",
    "tokens/forward",
    "tokens/s",
    "× AR",
    "same as AR",
    "fast-forwarded",
    "stationary",
    "perplexity",
    "response tokens",
)


def results_table(results: Mapping[str, Any]) -> str:
    """One line for each model and method."""
    return markdown_table((*_NAMES, *_FIGURES), map(_cells, results["rows"]), _FIGURES)


def results_text(results: Mapping[str, Any]) -> str:
    """The table and the comparisons between the models, in words."""
    difference = results["cllm_minus_teacher"]
    low, high = difference["ci95"]
    hardware = results["speed_hardware"]
    machine = ", ".join(sorted(set(hardware["gpus"]))) or f"{hardware['cpu']} (threads: {hardware['threads']})"
    return "\n".join(
        [
            f"{results['task']}: {results['metric']} over {results['num_prompts']} held-out prompts, greedy.",
            "",
            results_table(results),
            "",
            f"CLLM (sliding Jacobi) minus teacher (AR), paired: {100 * difference['difference']:+.1f} points "
            f"(95% CI {100 * low:+.1f} to {100 * high:+.1f}). Their responses are the same token for token on "
            f"{results['agreement_with_teacher']:.1%} of the prompts.",
            "",
            f"Speed: {results['num_timed_prompts']} prompts one at a time, all methods in turns, on {machine}; median "
            f"of {results['recipe']['evaluate']['speed_repeats']} repeats. AR is block size 1 of the same decoder. "
            "Fast-forwarded: tokens committed per iteration; stationary: tokens per block that are right ahead of a "
            "wrong one, and stay (paper section 4.2).",
        ]
    )


def report(results: Mapping[str, Any], examples: Sequence[str], plot: str) -> str:
    """The whole page.

    Args:
        examples: responses with their decoding steps marked.
        plot: name of the image file beside the page.
    """
    provenance = results["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    return "\n\n".join(
        [
            f"# Evaluation of {results['recipe']['name']}",
            results_text(results),
            f"![Share of forward passes by tokens committed]({plot})",
            "## Decoding, step by step",
            *(f"```\n{example}\n```" for example in examples),
            "## Provenance",
            f"Commit {provenance['commit']}; {versions}; {provenance['time']}.\n",
        ]
    )


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = row["ci95"]
    return (
        row["model"],
        row["method"] + (f" n={row['block_size']}" if row["block_size"] > 1 else ""),
        f"{row['accuracy']:.1%} ({100 * low:.1f} to {100 * high:.1f})",
        f"{row['tpf']:.2f}",
        f"{row['tokens_per_s']:,.0f}",
        f"{row['speedup_over_ar']:.2f}",
        f"{row['identical_to_ar']:.1%}",
        _number(row["fast_forwarded"]),
        _number(row["stationary"]),
        _number(row["perplexity"]),
        f"{row['mean_response_tokens']:.1f}",
    )


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}" if value < 1e4 else f"{value:.2e}"
