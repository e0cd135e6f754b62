"""Which window the next step takes: the n that commits the most tokens a second, by measured step times and what the
rows accepted lately. No tensors.

A step of B rows with windows of n tokens takes `cost(B, n)` milliseconds and commits between B and B * n tokens. Up to
some B * n a GPU computes the guesses in the shade of reading its weights; beyond, every guess costs time, so n must
shrink as the batch grows. n = 1 is AR decoding, and no other n is taken unless it promises more.

Shapes: N widths to choose from, K tokens that a step may accept (k = 1 .. K), R slots of rows, O observations.
"""

import json
from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cllm.artifacts import write_atomic
from cllm.config import Config
from cllm.errors import InputError

Floats = npt.NDArray[np.float64]


class CostKey(Config):
    """What step times depend on besides batch and window; times measured under another key are refused."""

    device: str  # name of the GPU or CPU
    model: str  # digest of the model's shape
    dtype: str
    versions: dict[str, str]  # of the packages that do the work


class _CostFile(Config):
    key: CostKey
    batches: tuple[int, ...]
    widths: tuple[int, ...]
    milliseconds: tuple[tuple[float, ...], ...]


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

    @classmethod
    def load(cls, path: Path, key: CostKey) -> "CostTable":
        """Read a table.

        Raises:
            InputError: there is none, it is damaged, or it was measured under another key.
        """
        try:
            data = json.loads(path.read_text())
        except FileNotFoundError:
            raise InputError(f"{path}: no such table of step times") from None
        except ValueError as error:
            raise InputError(f"{path}: not valid JSON ({error})") from error
        file = _CostFile.from_data(data, where=str(path))
        for name, wanted in key:
            found = getattr(file.key, name)
            if found != wanted:
                raise InputError(f"{path}: step times of another {name} ({found}; this is {wanted}); measure again")
        return cls(file.batches, file.widths, file.milliseconds)

    def save(self, path: Path, key: CostKey) -> None:
        """Write the table so that `load` with an equal key gives it back."""
        rows = tuple(map(tuple, self.milliseconds.tolist()))
        file = _CostFile(key=key, batches=self.batches, widths=self.widths, milliseconds=rows)
        write_atomic(path, file.model_dump_json(indent=1))

    def cost(self, batch: int, n: int) -> float:
        """Milliseconds of a step: linear between measured batches, constant below the smallest.

        Raises:
            InputError: the batch is larger than all measured ones, or the width was not measured.
        """
        if n not in self.widths:
            raise InputError(f"n={n} was not measured; widths: {self.widths}")
        return float(self.costs_N(batch)[self.widths.index(n)])

    def costs_N(self, batch: int) -> Floats:
        """The same for all widths."""
        if not 1 <= batch <= self.batches[-1]:
            raise InputError(f"batch={batch} is outside the measured 1 .. {self.batches[-1]}")
        above = bisect_left(self.batches, batch)
        if above == 0:
            return self.milliseconds[0]
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

    def expected(self, n: int) -> float:
        """Mean tokens that a step of width n accepts, if every step has this width (sliding refill).

        A step that accepts a tokens leaves n - a predictions for the next one, whose other guesses are fresh; so after
        a good step comes a poor one. The mean is over the stationary law of that chain.
        """
        if n == 1:
            return 1.0
        # Rows of survival_CA: C = 0 .. n-1 carried guesses. Columns: P(accepted >= A), A = 1 .. n.
        is_carried_CA = np.arange(n) <= np.arange(n)[:, None]
        rates_CA = np.where(is_carried_CA, self.carried_K[:n], self.fresh)
        rates_CA[:, 0] = 1
        survival_CA = rates_CA.cumprod(1)
        law_CA = survival_CA - np.pad(survival_CA[:, 1:], ((0, 0), (0, 1)))
        step_CC = law_CA[:, ::-1]  # accepting A leaves n - A
        stationary_C = np.linalg.solve(np.eye(n) - step_CC.T + 1, np.ones(n))
        return float(stationary_C @ survival_CA.sum(1))

    def at_best(self, n: int) -> "Rates":
        """The rates if all that width n cannot show were as good as can be: an upper bound for wider windows."""
        carried_K = np.where(np.arange(1, len(self.carried_K) + 1) > n, _inside(1.0), self.carried_K)
        return Rates(carried_K, float(carried_K[:2][-1]))


class Acceptance:
    """Learns the rates at which guesses hold from what recent steps accepted.

    A step of width n that accepted a tokens asked a - 1 guesses that held and, if a < n, one that did not; it says
    nothing about those behind. Hence conditional rates, whose running product is the survival P(accepted >= k): the
    estimator of Kaplan and Meier for censored times. A rate nothing was observed of follows the rate before it, which
    makes the tail geometric.

    Each row's counts fade with its own steps, and every row weighs the same, however new it is: what it has not shown
    yet is filled up with the average of all rows, which fades slower.

    Args:
        max_width: K.
        row_memory, engine_memory: steps after which an observation weighs 1/e, in a row and in the average.
        row_prior: steps' worth of the average that every row starts with.
    """

    _FIRST_CARRIED, _FIRST_FRESH = 0.5, 0.1  # rates until something was observed
    _TAIL_PRIOR = 2.0  # guesses' worth of "as the rate before" in every rate of the average

    def __init__(
        self, max_width: int, *, row_memory: float = 32.0, engine_memory: float = 256.0, row_prior: float = 12.0
    ) -> None:
        self.max_width = max_width
        self._levels_K = np.arange(1, max_width + 1)
        self._row_decay = float(np.exp(-1 / row_memory))
        self._engine_decay = float(np.exp(-1 / engine_memory))
        self._row_prior = row_prior
        # How many guesses were asked and how many of them held. Entry k - 1 counts the carried guesses that would make
        # a step accept k tokens; entry 0, which no carried guess needs, counts all fresh ones.
        self._asked_K, self._held_K = np.zeros(max_width), np.zeros(max_width)
        self._asked_K[:2] = 1
        self._held_K[:2] = (self._FIRST_FRESH, self._FIRST_CARRIED)[:max_width]
        self._slots: dict[Hashable, int] = {}
        self._free: list[int] = []
        self._asked_RK, self._held_RK = np.zeros((1, max_width)), np.zeros((1, max_width))
        self._steps_R = np.zeros(1)  # slot 0 stands for rows that were not observed yet
        self._carried_R = np.zeros(1, dtype=np.int64)  # guesses that stand ready for the row's next step
        self._pending: dict[int, tuple[int, int]] = {}  # slot: (n, accepted)

    def observe(self, row: Hashable, n: int, accepted: int) -> None:
        """Note a step: cheap, for it is called for every row of every step.

        Raises:
            InputError: `n` or `accepted` is impossible.
        """
        if not 1 <= accepted <= n <= self.max_width:
            raise InputError(f"accepted={accepted} of n={n} tokens is outside 1 <= accepted <= n <= {self.max_width}")
        slot = self._slots.get(row) or self._open(row)
        if slot in self._pending:
            self._learn()
        self._pending[slot] = (n, accepted)

    def forget(self, row: Hashable) -> None:
        """Drop a row; what it taught the average stays. Nothing if the row is not known."""
        slot = self._slots.pop(row, None)
        if slot is not None:
            self._learn()
            self._free.append(slot)

    def rates(self, rows: Sequence[Hashable]) -> list[tuple[int, Rates]]:
        """The rates of the half of `rows` that accept less and of the half that accept more, each with its size.

        Rows of two kinds do not behave like rows of the average kind: who accepts much also leaves few predictions to
        its next step. One row is one half; without rows, the average of all rows seen counts as one.
        """
        self._learn()
        average = self._average_rates()
        if not rows:
            return [(1, average)]
        slots_R = np.array([self._slots.get(row, 0) for row in rows])
        share_R = (self._held_RK[slots_R].sum(1) + 1) / (self._asked_RK[slots_R].sum(1) + 2)
        halves = np.array_split(slots_R[share_R.argsort(kind="stable")], min(2, len(rows)))
        return [(len(half_R), self._rates_of(half_R, average)) for half_R in halves]

    def _rates_of(self, slots_R: npt.NDArray[np.int64], average: Rates) -> Rates:
        weights_R = 1 / (self._steps_R[slots_R] + self._row_prior)
        asked_K, held_K = weights_R @ self._asked_RK[slots_R], weights_R @ self._held_RK[slots_R]
        return _shrunk(held_K, asked_K, average, self._row_prior * float(weights_R.sum()))

    def _average_rates(self) -> Rates:
        carried = [1.0]
        for held, asked in zip(self._held_K[1:].tolist(), self._asked_K[1:].tolist(), strict=True):
            before = carried[-1] if len(carried) > 1 else held / asked
            carried.append(_inside((held + self._TAIL_PRIOR * before) / (asked + self._TAIL_PRIOR)))
        return Rates(np.array(carried), _inside(self._held_K[0] / self._asked_K[0]))

    def _learn(self) -> None:
        """Count the pending observations."""
        if not self._pending:
            return
        slots_O = np.fromiter(self._pending, dtype=np.int64)
        width_O, accepted_O = np.array(list(self._pending.values())).T
        self._pending.clear()
        held_OK = self._levels_K <= accepted_O[:, None]
        asked_OK = self._levels_K <= np.minimum(accepted_O + 1, width_O)[:, None]
        is_fresh_OK = self._levels_K > 1 + self._carried_R[slots_O][:, None]
        held_OK, asked_OK = _fresh_first(held_OK, is_fresh_OK), _fresh_first(asked_OK, is_fresh_OK)
        self._carried_R[slots_O] = np.maximum(self._carried_R[slots_O], width_O) - accepted_O
        self._steps_R[slots_O] = self._row_decay * self._steps_R[slots_O] + 1
        self._held_RK[slots_O] = self._row_decay * self._held_RK[slots_O] + held_OK
        self._asked_RK[slots_O] = self._row_decay * self._asked_RK[slots_O] + asked_OK
        # The last guess's worth never fades: while n is 1, what is known of wider windows stays known.
        kept_K = np.clip(1 / np.maximum(self._asked_K, 1e-9), self._engine_decay, 1)
        self._held_K = kept_K * self._held_K + held_OK.sum(0)
        self._asked_K = kept_K * self._asked_K + asked_OK.sum(0)

    def _open(self, row: Hashable) -> int:
        if not self._free:
            self._grow()
        slot = self._slots[row] = self._free.pop()
        self._held_RK[slot] = self._asked_RK[slot] = self._steps_R[slot] = self._carried_R[slot] = 0
        return slot

    def _grow(self) -> None:
        size = len(self._steps_R)
        more = size + 1
        self._free = list(range(size + more - 1, size - 1, -1))
        self._held_RK = np.pad(self._held_RK, ((0, more), (0, 0)))
        self._asked_RK = np.pad(self._asked_RK, ((0, more), (0, 0)))
        self._steps_R = np.pad(self._steps_R, (0, more))
        self._carried_R = np.pad(self._carried_R, (0, more))


class WindowPolicy(Protocol):
    """Chooses each step's window from what the rows accepted."""

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

    def choose(self, rows: Sequence[Hashable]) -> int:
        return self.n

    def observe(self, row: Hashable, n: int, accepted: int) -> None:
        pass

    def forget(self, row: Hashable) -> None:
        pass


class AdaptiveWindow:
    """The n with the most expected tokens a millisecond.

    A window that is not in use teaches nothing, so now and then the policy probes a wider one for a few steps. As a
    wider window accepts at least what a narrower one would, a probe of width w in place of n wastes at most
    cost(w) - cost(n) a step; that is paid from `probe_share` of the time since the last probe, and probes that could
    not change the decision even if every further guess held are left out.

    Args:
        costs: step times; its largest batch bounds the batches.
        widths: the n to choose from, increasing, 1 among them, all in the table.
        hysteresis: gain that a change must promise, as a share; no change is made for less.
        decide_every: steps between decisions.
        probe_every: fewest steps between probes.
        probe_steps: steps of a probe; the first only fills the window.
        probe_share: bound on the time wasted by probes, as a share of all time.
        acceptance: the estimator; None: one with its default memory.

    Raises:
        InputError: the widths are not as said.
    """

    def __init__(
        self,
        costs: CostTable,
        widths: Sequence[int],
        *,
        hysteresis: float = 0.02,
        decide_every: int = 4,
        probe_every: int = 32,
        probe_steps: int = 4,
        probe_share: float = 0.01,
        acceptance: Acceptance | None = None,
    ) -> None:
        self.costs = costs
        self.widths = _increasing("widths", widths)
        if self.widths[0] != 1:
            raise InputError("widths: 1 must be among them, for AR decoding is the choice when guesses do not pay")
        unmeasured = sorted(set(self.widths) - set(costs.widths))
        if unmeasured:
            raise InputError(f"widths: {unmeasured} not in the table of step times, which has {costs.widths}")
        self.hysteresis = hysteresis
        self.decide_every = decide_every
        self.probe_every = probe_every
        self.probe_steps = probe_steps
        self.probe_share = probe_share
        self.acceptance = acceptance or Acceptance(self.widths[-1])
        self._columns_N = np.array([costs.widths.index(n) for n in self.widths])
        self._widths_N = np.array(self.widths)
        self._choice = 0  # index in widths
        self._steps_to_decision = 0
        self._probe: int | None = None  # index in widths
        self._probe_steps_left = 0
        self._steps_since_probe = 0
        self._credit = 0.0  # milliseconds that a probe may waste

    def choose(self, rows: Sequence[Hashable]) -> int:
        """n of the next step.

        Raises:
            InputError: more rows than the table of step times knows.
        """
        if not rows:
            return self.widths[self._choice]
        if self._probe is not None:
            self._probe_steps_left -= 1
            if self._probe_steps_left >= 0:
                return self.widths[self._probe]
            self._probe, self._steps_to_decision = None, 0
        costs_N = self.costs.costs_N(len(rows))[self._columns_N]
        self._credit += self.probe_share * float(costs_N[self._choice])
        self._steps_since_probe += 1
        if self._steps_to_decision == 0:
            self._steps_to_decision = self.decide_every
            rates = self.acceptance.rates(rows)
            self._decide(rates, costs_N)
            if self._steps_since_probe >= self.probe_every:
                self._consider_probe(rates, costs_N)
        self._steps_to_decision -= 1
        return self.widths[self._choice if self._probe is None else self._probe]

    def observe(self, row: Hashable, n: int, accepted: int) -> None:
        self.acceptance.observe(row, n, accepted)

    def forget(self, row: Hashable) -> None:
        self.acceptance.forget(row)

    def _decide(self, rates: list[tuple[int, Rates]], costs_N: Floats) -> None:
        speed_N = self._tokens_N(rates) / costs_N
        best = int(speed_N.argmax())  # the narrowest of equals
        gain = speed_N[best] / speed_N[self._choice] - 1
        if gain > self.hysteresis or speed_N[self._choice] < speed_N[0]:
            self._choice = best

    def _consider_probe(self, rates: list[tuple[int, Rates]], costs_N: Floats) -> None:
        """Start the most promising probe that the credit pays for; what is left of the credit lapses."""
        n = self.widths[self._choice]
        best = [(size, half.at_best(n)) for size, half in rates]
        speed_N = self._tokens_N(best) / costs_N
        wasted_N = self.probe_steps * (costs_N - costs_N[self._choice])
        is_candidate_N = (self._widths_N > n) & (wasted_N <= self._credit)
        is_candidate_N &= speed_N > (1 + self.hysteresis) * speed_N[self._choice]
        if is_candidate_N.any():
            self._probe = int(np.where(is_candidate_N, speed_N, 0.0).argmax())
            self._probe_steps_left = self.probe_steps - 1
            self._steps_since_probe, self._credit = 0, 0.0

    def _tokens_N(self, rates: list[tuple[int, Rates]]) -> Floats:
        return np.array([sum(size * half.expected(n) for size, half in rates) for n in self.widths])


def _fresh_first(counts_OK: npt.NDArray[np.bool_], is_fresh_OK: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Counts by level with those of fresh guesses summed into the first entry."""
    result_OK = (counts_OK & ~is_fresh_OK).astype(np.int64)
    result_OK[:, 0] = (counts_OK & is_fresh_OK).sum(1)
    return result_OK


def _shrunk(held_K: Floats, asked_K: Floats, average: Rates, prior: float) -> Rates:
    """Rates from weighted counts and `prior` rows' worth of the average.

    Level by level the average is first shifted, in odds, by what the batch differed from it one level before.
    """
    fresh = (held_K[0] + prior * average.fresh) / (asked_K[0] + prior)
    carried, survival, odds_ratio = [1.0], 1.0, 1.0
    levels = zip(held_K[1:].tolist(), asked_K[1:].tolist(), average.carried_K[1:].tolist(), strict=True)
    for held, asked, mean in levels:
        expected = mean * odds_ratio / (1 - mean + mean * odds_ratio)
        weight = prior * survival  # the average's rows asked this guess only if the ones before held
        rate = _inside((held + weight * expected) / (asked + weight))
        carried.append(rate)
        survival *= rate
        odds_ratio = rate / (1 - rate) * (1 - mean) / mean
    return Rates(np.array(carried), _inside(fresh))


def _inside(rate: float) -> float:
    """Away from 0 and 1, so that odds are finite and the chain of steps has one stationary law."""
    return min(max(rate, 1e-3), 1 - 1e-3)


def _increasing(name: str, values: Sequence[int]) -> tuple[int, ...]:
    if not values or values[0] < 1 or any(low >= high for low, high in pairwise(values)):
        raise InputError(f"{name} must be strictly increasing from 1 or more, got {list(values)}")
    return tuple(values)
