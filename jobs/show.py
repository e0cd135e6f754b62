"""An evaluation on the terminal: its table, and an answer while it is being decoded."""

import sys
import time
from collections.abc import Iterable, Mapping
from itertools import groupby
from operator import itemgetter
from typing import Any

from cllm.evaluation.live import Step
from cllm.report.markdown import results_text
from cllm.report.steps import coloured_step, prompt_end, step_example

# Every forward pass is shown for the same time, whatever it took: long enough for the eye to follow the short answers,
# and no longer than MOST_SECONDS in all for AR decoding of a long one.
SECONDS_A_FORWARD = 0.12
MOST_SECONDS = 6.0


def show(results: Mapping[str, Any], live: Iterable[Step] | None = None) -> None:
    """Print the table of a results document, and its examples with what each forward pass committed.

    On a terminal the first example is written forward pass by forward pass, by AR and then by Jacobi decoding.

    Args:
        live: the first example being decoded now; None: as it was decoded in the evaluation.
    """
    print(f"\n{results_text(results)}\n", flush=True)
    examples = results.get("examples", [])  # evaluations by older code have none
    if examples and sys.stdout.isatty():
        animate(examples[0], recorded(examples[0]) if live is None else live)
    else:
        print("\n\n".join(map(marked, examples)), flush=True)


def marked(example: Mapping[str, Any]) -> str:
    """An example as text, with a bar between the forward passes."""
    return step_example(example["prompt"], example["jacobi"], len(example["ar"]))


def recorded(example: Mapping[str, Any]) -> list[Step]:
    """An example's forward passes as they were in the evaluation."""
    return [*(("ar", text) for text in example["ar"]), *(("jacobi-sliding", text) for text in example["jacobi"])]


def animate(example: Mapping[str, Any], steps: Iterable[Step]) -> None:
    """Write the steps one after the other, each when its time has come."""
    seconds = min(SECONDS_A_FORWARD, MOST_SECONDS / len(example["ar"]))
    print(f"{prompt_end(example['prompt'])}\n  (slowed down: {seconds:.2f} s for each forward pass)", flush=True)
    for method, group in groupby(steps, key=itemgetter(0)):
        print(f"{method}: ", end="", flush=True)
        number = 0
        for number, (_, text) in enumerate(group, start=1):
            print(coloured_step(number, text), end="", flush=True)
            time.sleep(seconds)
        print(f"\n  {number} forward passes", flush=True)
