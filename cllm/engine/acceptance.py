"""How often guesses hold, learnt from what recent steps accepted. No tensors.

Shapes: K tokens that a step may accept (k = 1 .. K), R rows, S steps, O observations, C guesses carried into a step,
A tokens accepted by it, H the two counts of guesses: those that held and those that were asked.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np
import numpy.typing as npt

from cllm.errors import InputError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Rates:
    """How often a guess holds, given that all before it in its window did.

    Attributes:
        carried_K: for a guess that was a prediction of an earlier step; entry k - 1 for the one that makes a step
            accept k tokens, and 1 for the first token, which needs no guess.
        fresh: for an initial guess, made without the model.
    """

    carried_K: Floats
    fresh: float

    def expected(self, widths: Sequence[int]) -> list[float]:
        """Mean tokens that a step of each width accepts, if every step has this width (sliding refill).

        A step that accepts a tokens leaves n - a predictions for the next one, whose other guesses are fresh; so after
        a good step comes a poor one. The mean is over the stationary law of that chain.
        """
        # Rows of survival_CA: C = 0, 1 .. carried guesses. Columns: P(accepted >= A), A = 1, 2 ..
        levels = np.arange(max(widths))
        survival_CA = np.where(levels <= levels[:, None], self.carried_K[: len(levels)], self.fresh)
        survival_CA[:, 0] = 1
        survival_CA = survival_CA.cumprod(1)
        return [_stationary_mean(survival_CA[:n, :n]) if n > 1 else 1.0 for n in widths]

    def at_best(self, n: int) -> "Rates":
        """The rates if all that width n cannot show were as good as can be: an upper bound for wider windows."""
        carried_K = np.where(np.arange(1, len(self.carried_K) + 1) > n, _inside(1.0), self.carried_K)
        return Rates(carried_K, max(self.fresh, float(carried_K[:2][-1])))


Halves = list[tuple[int, Rates]]  # rates of some rows, and how many rows these are


@dataclass(slots=True)
class _Row:
    """A row's place in the recent counts, and its steps that are not counted yet.

    A step is noted as n * (K + 1) + accepted; in front stands one that accepted none, as wide as the guesses carried.
    """

    place: int = 0
    steps: list[int] = field(default_factory=lambda: [0])


class Acceptance:
    """Learns the rates at which guesses hold from what recent steps accepted.

    A step of width n that accepted a tokens asked a - 1 guesses that held and, if a < n, one that did not; it says
    nothing about those behind. Hence conditional rates, whose running product is the survival P(accepted >= k): the
    estimator of Kaplan and Meier for censored times. A rate nothing was observed of follows the rate before it, which
    makes the tail geometric.

    Every row's counts fade as steps pass. What a row has not shown yet is filled up with the average of all rows, which
    fades slower.

    Args:
        max_width: K.
    """

    _ROW_MEMORY, _AVERAGE_MEMORY = 32.0, 256.0  # steps after which an observation weighs 1/e
    _ROW_PRIOR = 12.0  # steps' worth of the average that every row starts with
    _TAIL_PRIOR = 2.0  # guesses' worth of "as the rate before" in every rate of the average
    _FIRST_CARRIED, _FIRST_FRESH = 0.5, 0.1  # rates until something was observed
    _MOST_FINISHED = 256  # rows that wait to be counted

    def __init__(self, max_width: int) -> None:
        self.max_width = max_width
        # Entry k - 1 counts the carried guesses that would make a step accept k tokens; entry 0, which no carried guess
        # needs, counts all fresh ones.
        self._average_HK = np.zeros((2, max_width))
        self._average_HK[:, :2] = np.array([[self._FIRST_FRESH, self._FIRST_CARRIED], [1, 1]])[:, :max_width]
        self._recent_RHK = np.zeros((1, 2, max_width))  # place 0 is that of rows without counts
        self._rows: dict[Hashable, _Row] = {}
        self._finished: list[_Row] = []

    def observe(self, row: Hashable, n: int, accepted: int) -> None:
        """Note a step: cheap, for it is called for every row of every step.

        Raises:
            InputError: `n` or `accepted` is impossible.
        """
        if not 1 <= accepted <= n <= self.max_width:
            raise InputError(f"accepted={accepted} of n={n} tokens is outside 1 <= accepted <= n <= {self.max_width}")
        known = self._rows.get(row)
        if known is None:
            known = self._rows[row] = _Row()
        known.steps.append(n * (self.max_width + 1) + accepted)

    def forget(self, row: Hashable) -> None:
        """Drop a row; what it taught the average stays. Nothing if the row is not known."""
        known = self._rows.pop(row, None)
        if known is not None:
            self._finished.append(known)
            if len(self._finished) == self._MOST_FINISHED:
                self._learn()

    def rates(self) -> Halves:
        """The rates of the half of the rows that accept less and of the half that accept more, each with its size.

        Rows of two kinds do not behave like rows of the average kind: who accepts much also leaves few predictions to
        its next step. One row is one half; without rows, the average of all rows seen counts as one.
        """
        self._learn()
        recent_RHK = self._recent_RHK[1:] if self._rows else self._recent_RHK
        held_R, asked_R = recent_RHK.sum(2).T
        order_R = ((held_R + 1) / (asked_R + 2)).argsort(kind="stable")
        middle = len(order_R) // 2
        halves = [recent_RHK[half_R] for half_R in (order_R[:middle], order_R[middle:]) if len(half_R)]
        return [(len(half_RHK), self._shrunk(half_RHK)) for half_RHK in halves]

    def _shrunk(self, recent_RHK: Floats) -> Rates:
        """Rates of rows together, from their recent counts and the average."""
        prior = self._ROW_PRIOR * len(recent_RHK)
        levels = np.concatenate([self._average_HK, recent_RHK.sum(0)]).T.tolist()
        average_held, average_asked, held, asked = levels[0]
        fresh = _inside((held + prior * average_held / average_asked) / (asked + prior))
        carried, survival, mean = [1.0], 1.0, None
        for average_held, average_asked, held, asked in levels[1:]:
            before = average_held / average_asked if mean is None else mean
            mean = (average_held + self._TAIL_PRIOR * before) / (average_asked + self._TAIL_PRIOR)
            weight = prior * survival + 1e-9  # the average's rows asked this guess only if the ones before held
            carried.append(_inside((held + weight * mean) / (asked + weight)))
            survival *= carried[-1]
        return Rates(np.array(carried), fresh)

    def _learn(self) -> None:
        """Move the noted steps into the counts."""
        rows = [*self._rows.values(), *self._finished]
        if not rows:
            return
        steps_SR = np.array(list(zip_longest(*(row.steps for row in rows), fillvalue=0)))
        width_SR, accepted_SR = np.divmod(steps_SR, self.max_width + 1)
        counts_RHK, carried_R = _count(width_SR, accepted_SR, self.max_width)
        passed = len(steps_SR) - 1
        # The last guess's worth never fades: while n is 1, what is known of wider windows stays known.
        kept_K = np.maximum(math.exp(-passed / self._AVERAGE_MEMORY), 1 / np.maximum(self._average_HK[1], 1))
        self._average_HK = kept_K * self._average_HK + counts_RHK.sum(0)
        faded_RHK = math.exp(-passed / self._ROW_MEMORY) * self._recent_RHK[[row.place for row in rows]]
        recent_RHK = (faded_RHK + counts_RHK)[: len(self._rows)]
        self._recent_RHK = np.concatenate([np.zeros_like(self._recent_RHK[:1]), recent_RHK])
        for place, (row, carried) in enumerate(zip(self._rows.values(), carried_R.tolist(), strict=False), 1):
            row.place, row.steps = place, [carried * (self.max_width + 1)]
        self._finished.clear()


def _stationary_mean(survival_CA: Floats) -> float:
    """Mean accepted tokens in the long run of steps of one width, n = C = A."""
    n = len(survival_CA)
    carried = np.arange(n)
    # Who accepts A or more carries n - A or less on, and both are as probable in the long run.
    balance_CA = (carried + carried[:, None] < n) - survival_CA
    balance_CA[:, 0] = 1  # all probabilities add up to 1
    law_C = np.linalg.solve(balance_CA.T, carried == 0)
    return float(n - law_C @ carried)


def _count(width_SR: Ints, accepted_SR: Ints, max_width: int) -> tuple[Ints, Ints]:
    """Counts_RHK of the steps of each row, and the guesses that its last step carries on.

    A step carries max(carried, n) - accepted guesses on: they reach as far as those of any step before it.
    """
    end_SR = accepted_SR.cumsum(0)
    start_SR = end_SR - accepted_SR
    reach_SR = np.maximum.accumulate(start_SR + width_SR, 0)
    step_O, row_O = accepted_SR.nonzero()
    accepted_O, width_O = accepted_SR[step_O, row_O], width_SR[step_O, row_O]
    carried_O = 1 + reach_SR[step_O - 1, row_O] - start_SR[step_O, row_O]  # tokens accepted if all of these hold
    num_rows, num_bins = width_SR.shape[1], max_width + 1
    counts_RHK = np.empty((num_rows, 2, max_width), dtype=np.int64)
    for kind, last_O in enumerate((accepted_O, np.minimum(accepted_O + 1, width_O))):
        bins_O = row_O * num_bins + np.minimum(last_O, carried_O)
        ends_RK = np.bincount(bins_O, minlength=num_rows * num_bins).reshape(num_rows, num_bins)
        counts_RHK[:, kind] = ends_RK[:, :0:-1].cumsum(1)[:, ::-1]
        counts_RHK[:, kind, 0] = np.bincount(row_O, np.maximum(last_O - carried_O, 0), num_rows)
    return counts_RHK, reach_SR[-1] - end_SR[-1]


def _inside(rate: float) -> float:
    """Away from 0 and 1, so that the chain of steps has one stationary law."""
    return min(max(rate, 1e-3), 1 - 1e-3)
