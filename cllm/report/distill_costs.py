"""What collection and training cost, as a document of plain data and as text."""

from collections.abc import Mapping
from typing import Any

from cllm.evaluation.collection_speed import CollectionSpeed
from cllm.evaluation.distill_costs import CostComparison, TokenCost
from cllm.evaluation.timing import Timing
from cllm.report.tables import markdown_table

# How many times cheaper than in the paper's code collection and training should be.
COLLECTION_GOAL = 20
TRAINING_GOAL = 10


def collection_document(speed: CollectionSpeed, threads: int) -> dict[str, Any]:
    return {
        "ratio": speed.ratio,
        "goal": COLLECTION_GOAL,
        "batched": _timing(speed.batched, speed.num_batched),
        "one_by_one": _timing(speed.one_by_one, speed.num_one_by_one),
        "identical_responses": speed.identical,
        "repeats": len(speed.batched.repeats),
        "threads": threads,
    }


def comparison_document(comparison: CostComparison) -> dict[str, Any]:
    return {
        "ratio": comparison.ratio,
        "ratio_per_noisy_token": comparison.ratio_per_noisy_token,
        "packed": _cost(comparison.packed),
        "three_forwards": _cost(comparison.three_forwards),
    }


def costs_text(document: Mapping[str, Any]) -> str:
    """Both tables, each with its ratio held against its goal."""
    return f"{collection_text(document['collection'])}\n\n{_training_text(document['training_tokens'])}"


def collection_text(collection: Mapping[str, Any]) -> str:
    """The table of both ways to collect, with its ratio held against its goal."""
    title = (
        f"Collection, response tokens/s (threads: {collection['threads']}; median of {collection['repeats']} "
        "repeats in turns, slowest and fastest in brackets)"
    )
    rows = []
    for key, name in (("batched", "batched, with cache"), ("one_by_one", "one at a time, without cache")):
        way = collection[key]
        low, high = way["spread"]
        rows.append((name, str(way["prompts"]), f"{way['tokens_per_s']:,.0f} ({low:,.0f} to {high:,.0f})"))
    figures = ("prompts", "tokens/s")
    table = markdown_table(("way", *figures), rows, figures)
    identical = f"{collection['identical_responses']:.0%} of the responses are the same"
    verdict = _against_goal(collection["ratio"], collection["goal"])
    return f"{title}\n\n{table}\n\n{verdict}; {identical}."


def _training_text(training: Mapping[str, Any]) -> str:
    lengths = training["mean_lengths"]
    block = f"a trained block of n = {training['block_size']}"
    title = f"Training, token-forwards {block} (refinement and padding included)"
    rows = []
    for row in training["rows"]:
        three, packed = row["three_forwards"]["per_block"], row["packed"]["per_block"]
        rows.append((row["responses"], row["loss"], f"{three:,.0f}", f"{packed:,.0f}", f"{row['ratio']:.1f}"))
    figures = ("three forwards", "packed", "ratio")
    table = markdown_table(("responses", "loss", *figures), rows, figures)
    verdict = _against_goal(training["ratio"], training["goal"])
    if training["ratio"] < training["goal"]:
        verdict += (
            f": with {lengths['prompt']:.0f} prompt and {lengths['response']:.0f} response tokens a response has only "
            f"{lengths['blocks']:.1f} blocks to share its prompt and its clean tokens between"
        )
    return f"{title}\n\n{table}\n\nThis run with the recipe's loss: {verdict}."


def _against_goal(ratio: float, goal: int) -> str:
    return f"{ratio:.1f}× (goal {goal}×: {'met' if ratio >= goal else 'missed'})"


def _timing(timing: Timing, num_prompts: int) -> dict[str, Any]:
    return {"prompts": num_prompts, "tokens_per_s": timing.tokens_per_s, "spread": list(timing.spread)}


def _cost(cost: TokenCost) -> dict[str, Any]:
    return {
        "token_forwards": cost.token_forwards,
        "blocks": cost.blocks,
        "noisy_tokens": cost.noisy_tokens,
        "per_block": cost.per_block,
    }
