"""Which window the next step takes: the n that commits the most tokens a second, by measured step times and what the
rows accepted lately. No tensors.

A step of B rows with windows of n tokens takes `cost(B, n)` milliseconds and commits between B and B * n tokens. Up to
some B * n a GPU computes the guesses in the shade of reading its weights; beyond, every guess costs time, so n must
shrink as the batch grows. n = 1 is AR decoding, and no other n is taken unless it promises more.

Shapes: N widths to choose from, K tokens that a step may accept (k = 1 .. K), R rows, S steps, O observations, H the
two counts of guesses: those that held and those that were asked.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, zip_longest
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cllm.errors import InputError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class CostTable:
    """Milliseconds of a step, measured for some batches and widths.

    Noise only ever adds time, and a smaller step takes no longer than a larger one; so a point above one for a larger
    batch or window is brought down to it.

    Args:
        batches, widths: strictly increasing, 1 at least.
        milliseconds: positive, one list of N for each batch.

    Raises:
        InputError: they are not, or the sizes do not fit.
    """

    def __init__(
        self, batches: Sequence[int], widths: Sequence[int], milliseconds: Sequence[Sequence[float]] | Floats
    ) -> None:
        self.batches = _increasing("batches", batches)
        self.widths = _increasing("widths", widths)
        measured = np.array(milliseconds, dtype=np.float64)
        expected = (len(self.batches), len(self.widths))
        if measured.shape != expected:
            raise InputError(f"milliseconds: shape {measured.shape}, {expected} expected (batches, widths)")
        if not (np.isfinite(measured).all() and (measured > 0).all()):
            raise InputError("milliseconds: every step takes a positive, finite time")
        for axis in (0, 1):
            measured = np.flip(np.minimum.accumulate(np.flip(measured, axis), axis), axis)
        self.milliseconds = measured

    @classmethod
    def measure(
        cls, time_step: Callable[[int, int], float], batches: Sequence[int], widths: Sequence[int]
    ) -> "CostTable":
        """Time every point; `time_step(batch, n)` returns the milliseconds of one step."""
        return cls(batches, widths, [[time_step(batch, n) for n in widths] for batch in batches])

    def cost(self, batch: int, n: int) -> float:
        """Milliseconds of a step.

        Linear between measured batches, constant below the smallest, in proportion to the batch beyond the largest.

        Raises:
            InputError: there is no row, or the width was not measured.
        """
        if n not in self.widths:
            raise InputError(f"n={n} was not measured; widths: {self.widths}")
        return float(self.costs_N(batch)[self.widths.index(n)])

    def costs_N(self, batch: int) -> Floats:
        """The same for all widths."""
        if batch < 1:
            raise InputError(f"batch must be >= 1, got {batch}")
        above = bisect_left(self.batches, batch)
        if above == 0:
            return self.milliseconds[0]
        if above == len(self.batches):
            return self.milliseconds[-1] * (batch / self.batches[-1])
        low, high = self.batches[above - 1], self.batches[above]
        share = (batch - low) / (high - low)
        return (1 - share) * self.milliseconds[above - 1] + share * self.milliseconds[above]


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
        return Rates(carried_K, float(carried_K[:2][-1]))


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


class WindowPolicy(Protocol):
    """Chooses each step's window from what the rows accepted."""

    @property
    def widths(self) -> Sequence[int]:
        """The windows that it may choose."""

    def choose(self, rows: Sequence[Hashable]) -> int:
        """n of the next step, one for the whole batch; `rows` are the keys of the rows that it decodes."""

    def observe(self, row: Hashable, n: int, accepted: int) -> None:
        """A step of width n committed `accepted` tokens to the row.

        Leave out a step that ended the row: its length or an end token cut it short, not a wrong guess.
        """

    def forget(self, row: Hashable) -> None:
        """The row is finished."""


class FixedWindow:
    """The same n in every step."""

    def __init__(self, n: int) -> None:
        if n < 1:
            raise InputError(f"n must be >= 1, got {n}")
        self.n = n
        self.widths = (n,)

    def choose(self, rows: Sequence[Hashable]) -> int:
        return self.n

    def observe(self, row: Hashable, n: int, accepted: int) -> None:
        pass

    def forget(self, row: Hashable) -> None:
        pass


class AdaptiveWindow:
    """The n with the most expected tokens a millisecond.

    A decision takes the host far longer than a step's notes, so decisions become rarer while they agree. One is due by
    the time that all rows have been replaced. Another size of the batch acts at once, on what is known of its rows.

    A window that is not in use teaches nothing, so now and then the policy probes a wider one for a few steps. As a
    wider window accepts at least what a narrower one would, a probe of width w in place of n wastes at most
    cost(w) - cost(n) a step; that is paid from `probe_share` of the time since the last probe, and probes that could
    not change the decision even if every further guess held are left out.

    Args:
        costs: step times.
        widths: the n to choose from, increasing, 1 among them, all in the table.
        hysteresis: gain that a change must promise, as a share; no change is made for less.
        probe_share: bound on the time wasted by probes, as a share of all time.

    Raises:
        InputError: the widths are not as said.
    """

    _FIRST_INTERVAL, _LAST_INTERVAL = 4, 32  # steps between decisions: after a change; doubled while nothing changes
    _PROBE_STEPS = 4  # the first only fills the window

    def __init__(
        self, costs: CostTable, widths: Sequence[int], *, hysteresis: float = 0.02, probe_share: float = 0.01
    ) -> None:
        self.costs = costs
        self.widths = _increasing("widths", widths)
        if self.widths[0] != 1:
            raise InputError("widths: 1 must be among them, for AR decoding is the choice when guesses do not pay")
        unmeasured = sorted(set(self.widths) - set(costs.widths))
        if unmeasured:
            raise InputError(f"widths: {unmeasured} not in the table of step times, which has {costs.widths}")
        self.hysteresis = hysteresis
        self.probe_share = probe_share
        self.acceptance = Acceptance(self.widths[-1])
        self._columns_N = [costs.widths.index(n) for n in self.widths]
        self._batch = 0
        self._costs: list[float] = []  # of the widths, for this batch
        self._tokens = [1.0] * len(self.widths)  # expected of the widths, up to a factor
        self._choice = 0  # index in widths
        self._n = 1  # the choice or a probe
        self._is_probe = False
        self._interval = self._FIRST_INTERVAL
        self._steps_left = 0  # to the next decision
        self._credit = 0.0  # milliseconds that a probe may waste

    def choose(self, rows: Sequence[Hashable]) -> int:
        """n of the next step; without rows, as before."""
        if not rows:
            return self._n
        if len(rows) != self._batch:
            self._resize(len(rows))
        if self._steps_left <= 0:
            self._decide()
        self._steps_left -= 1
        self._credit += self.probe_share * self._costs[self._choice]
        return self._n

    def observe(self, row: Hashable, n: int, accepted: int) -> None:
        self.acceptance.observe(row, n, accepted)

    def forget(self, row: Hashable) -> None:
        self.acceptance.forget(row)
        if not self._is_probe:
            self._steps_left -= self._interval // max(self._batch, 1)

    def _resize(self, batch: int) -> None:
        """Choose for another number of rows that accept as much as these."""
        self._batch = batch
        self._costs = self.costs.costs_N(batch)[self._columns_N].tolist()
        if self._change() and not self._is_probe:
            self._n, self._steps_left = self.widths[self._choice], min(self._steps_left, self._interval)

    def _decide(self) -> None:
        """Learn, choose, and perhaps start a probe, though not right after another."""
        rates = self.acceptance.rates()
        self._tokens = _tokens(rates, self.widths)
        if not self._change():
            self._interval = min(2 * self._interval, self._LAST_INTERVAL)
        probe = None if self._is_probe else self._probe(rates)
        self._is_probe = probe is not None
        self._n = probe or self.widths[self._choice]
        self._steps_left = self._PROBE_STEPS if self._is_probe else self._interval

    def _change(self) -> bool:
        """Change the choice if that promises enough; whether it did."""
        speeds = [tokens / cost for tokens, cost in zip(self._tokens, self._costs, strict=True)]
        best, current = max(speeds), speeds[self._choice]
        if best <= (1 + self.hysteresis) * current and current >= speeds[0]:
            return False
        self._choice = speeds.index(best)  # the narrowest of equals
        self._interval = self._FIRST_INTERVAL
        return True

    def _probe(self, rates: Halves) -> int | None:
        """Width of the most promising probe that the credit pays for; what is left of the credit lapses."""
        n, cost = self.widths[self._choice], self._costs[self._choice]
        limit = cost + self._credit / self._PROBE_STEPS
        wider = {w: c for w, c in zip(self.widths, self._costs, strict=True) if w > n and c <= limit}
        if not wider:
            return None
        tokens = _tokens([(size, half.at_best(n)) for size, half in rates], list(wider))
        speed, probe = max((most / wider[w], w) for most, w in zip(tokens, wider, strict=True))
        if speed <= (1 + self.hysteresis) * self._tokens[self._choice] / cost:
            return None
        self._credit = 0.0
        return probe


def _tokens(rates: Halves, widths: Sequence[int]) -> list[float]:
    """What a step of each width is expected to commit to all rows."""
    means = zip(*(half.expected(widths) for _, half in rates), strict=True)
    return [sum(size * mean for (size, _), mean in zip(rates, halves, strict=True)) for halves in means]


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


def _increasing(name: str, values: Sequence[int]) -> tuple[int, ...]:
    if not values or values[0] < 1 or any(low >= high for low, high in pairwise(values)):
        raise InputError(f"{name} must be strictly increasing from 1 or more, got {list(values)}")
    return tuple(values)
