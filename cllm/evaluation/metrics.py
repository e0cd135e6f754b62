"""Figures about decoded responses, each with its uncertainty where it is an estimate. No tensors, no models."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean

_Z95 = NormalDist().inv_cdf(0.975)  # half-width of a 95% interval in standard deviations


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its 95% interval [low, high]."""

    mean: float
    low: float
    high: float


def accuracy(scores: Sequence[float]) -> Estimate:
    """Mean of scores in [0, 1], one a prompt, with the Wilson interval.

    Wilson's stays inside [0, 1] and keeps a width at 0% and 100%. For scores between 0 and 1 it is too wide, never too
    narrow: no other distribution on [0, 1] with that mean varies as much as the one on {0, 1}.
    """
    n, mean = len(scores), fmean(scores)
    shrink = 1 + _Z95**2 / n
    centre = (mean + _Z95**2 / (2 * n)) / shrink
    half = _Z95 / shrink * math.sqrt(mean * (1 - mean) / n + _Z95**2 / (4 * n**2))
    # Rounding would otherwise leave an interval that just misses a mean of 0 or 1.
    return Estimate(mean, max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half)))


def paired_difference(scores: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """Mean of scores - baseline over the same prompts, with its 95% interval.

    Pairing removes the prompts' own difficulty, most of the variance. The interval is the normal one after adding two
    made-up prompts, half a win, half a loss and a tie (Agresti & Min 2005), so that a few hundred prompts without any
    difference do not prove that there is none.
    """
    differences = [mine - other for mine, other in zip(scores, baseline, strict=True)]
    n = len(differences) + 2
    centre = sum(differences) / n
    variance = (sum(d * d for d in differences) + 1) / n - centre**2
    half = _Z95 * math.sqrt(variance / n)
    return Estimate(fmean(differences), max(-1.0, centre - half), min(1.0, centre + half))


def ratio_of_sums(tops: Sequence[float], bottoms: Sequence[float]) -> Estimate:
    """Sum of `tops` over the sum of `bottoms`, a pair for each prompt, with its 95% interval over prompts.

    The interval is that of the linearised ratio (delta method), so it takes a few prompts to hold; for one prompt it is
    the value alone. What belongs to one prompt (the turns of a conversation) is to be added up before.
    """
    n, total = len(tops), sum(bottoms)
    value = sum(tops) / total
    if n < 2:
        return Estimate(value, value, value)
    squares = sum((top - value * bottom) ** 2 for top, bottom in zip(tops, bottoms, strict=True))
    half = _Z95 * math.sqrt(squares * n / (n - 1)) / total
    return Estimate(value, value - half, value + half)


def tokens_per_forward(accepted: Iterable[Sequence[int]]) -> float:
    """Total new tokens over total forward passes. `accepted`: for each response, tokens committed by each forward."""
    counts = [count for row in accepted for count in row]
    return sum(counts) / len(counts)


def step_histogram(accepted: Iterable[Sequence[int]]) -> dict[int, int]:
    """Tokens committed by one forward -> how many forwards committed that many; ascending."""
    return dict(sorted(Counter(count for row in accepted for count in row).items()))


def identical_rate(outputs: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> float:
    """Share of prompts whose two responses have exactly the same tokens, end token included."""
    return fmean(tuple(one) == tuple(other) for one, other in zip(outputs, others, strict=True))
