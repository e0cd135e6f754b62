"""Which window the next step takes: the n that commits the most tokens a second, by measured step times and what the
rows accepted lately. No tensors.

A step of B rows with windows of n tokens takes `cost(B, n)` milliseconds and commits between B and B * n tokens. Up to
some B * n a GPU computes the guesses in the shade of reading its weights; beyond, every guess costs time, so n must
shrink as the batch grows. n = 1 is AR decoding, and no other n is taken unless it promises more.
"""

from collections.abc import Hashable, Mapping, Sequence
from itertools import accumulate
from types import MappingProxyType
from typing import Protocol

from cllm.engine.acceptance import Acceptance, Halves
from cllm.engine.costs import CostTable, LiveCosts, Work, increasing
from cllm.errors import InputError


class WindowPolicy(Protocol):
    """Chooses each step's window from what the rows accepted."""

    @property
    def widths(self) -> Sequence[int]:
        """The windows that it may choose."""

    def choose(self, rows: Sequence[Hashable], work: Work = "greedy") -> int:
        """n of the next step, one for the whole batch.

        Args:
            rows: the keys of the rows that it decodes.
            work: what their draw takes.
        """

    def observe(self, row: Hashable, n: int, accepted: int) -> None:
        """A step of width n committed `accepted` tokens to the row.

        Leave out a step that ended the row: its length or an end token cut it short, not a wrong guess.
        """

    def measured(self, batch: int, n: int, milliseconds: float, work: Work = "greedy") -> None:
        """A step of so many rows, and nothing else beside it, took this long."""

    def forget(self, row: Hashable) -> None:
        """The row is finished."""


class FixedWindow:
    """The same n in every step."""

    def __init__(self, n: int) -> None:
        if n < 1:
            raise InputError(f"n must be >= 1, got {n}")
        self.n = n
        self.widths = (n,)

    def choose(self, rows: Sequence[Hashable], work: Work = "greedy") -> int:
        return self.n

    def observe(self, row: Hashable, n: int, accepted: int) -> None:
        pass

    def measured(self, batch: int, n: int, milliseconds: float, work: Work = "greedy") -> None:
        pass

    def forget(self, row: Hashable) -> None:
        pass


class AdaptiveWindow:
    """The n with the most expected tokens a millisecond.

    A decision takes the host far longer than a step's notes, so decisions become rarer while they agree. One is due by
    the time that all rows have been replaced. Another size of the batch acts at once, on what is known of its rows.

    A window that is not in use teaches nothing, so now and then the policy probes another one for a few steps. As a
    wider window accepts at least what a narrower one would, a probe of width w in place of n wastes at most
    cost(w) - cost(n) a step; a narrower one wastes the time that the tokens it leaves out take. That is paid from
    `probe_share` of the time since the last probe, and probes that could not change the decision even if every further
    guess held, and a time not measured lately were as short as can be, are left out.

    Args:
        costs: step times of greedy steps.
        widths: the n to choose from, increasing, 1 among them, all in the tables.
        others: step times of steps whose draw takes more; a kind without a table is taken for a greedy one.
        hysteresis: gain that a change must promise, as a share; no change is made for less.
        probe_share: bound on the time wasted by probes, as a share of all time.

    Raises:
        InputError: the widths are not as said.
    """

    _FIRST_INTERVAL, _LAST_INTERVAL = 4, 32  # steps between decisions: after a change; doubled while nothing changes
    _PROBE_STEPS = 4  # the first only fills the window
    _FIRST_CREDIT = 3  # AR steps' time: what probes may waste at the very beginning, when nothing is known

    def __init__(
        self,
        costs: CostTable,
        widths: Sequence[int],
        *,
        others: Mapping[Work, CostTable] = MappingProxyType({}),
        hysteresis: float = 0.02,
        probe_share: float = 0.01,
    ) -> None:
        self.widths = increasing("widths", widths)
        if self.widths[0] != 1:
            raise InputError("widths: 1 must be among them, for AR decoding is the choice when guesses do not pay")
        for table in (costs, *others.values()):
            unmeasured = sorted(set(self.widths) - set(table.widths))
            if unmeasured:
                raise InputError(f"widths: {unmeasured} not in the table of step times, which has {table.widths}")
        self.hysteresis = hysteresis
        self.probe_share = probe_share
        self.acceptance = Acceptance(self.widths[-1])
        self._greedy = LiveCosts(costs, self.widths)
        self._others = {work: LiveCosts(table, self.widths) for work, table in others.items()}
        self._batch = 0
        self._work: Work = "greedy"
        self._costs: list[float] = []  # of the widths, for this batch
        self._tokens = [1.0] * len(self.widths)  # expected of the widths, up to a factor
        self._choice = 0  # index in widths
        self._n = 1  # the choice or a probe
        self._is_probe = False
        self._interval = self._FIRST_INTERVAL
        self._steps_left = self._FIRST_INTERVAL  # to the next decision; what AR takes is known by then
        self._credit = 0.0  # milliseconds that a probe may waste

    def choose(self, rows: Sequence[Hashable], work: Work = "greedy") -> int:
        """n of the next step; without rows, as before."""
        if not rows:
            return self._n
        if len(rows) != self._batch or work != self._work:
            self._turn_to(len(rows), work)
        if self._steps_left <= 0:
            self._decide()
        self._steps_left -= 1
        self._credit += self.probe_share * self._costs[self._choice]
        return self._n

    def observe(self, row: Hashable, n: int, accepted: int) -> None:
        self.acceptance.observe(row, n, accepted)

    def measured(self, batch: int, n: int, milliseconds: float, work: Work = "greedy") -> None:
        self._live(work).observe(batch, n, milliseconds)

    def forget(self, row: Hashable) -> None:
        self.acceptance.forget(row)
        if not self._is_probe:
            self._steps_left -= self._interval // max(self._batch, 1)

    def _live(self, work: Work) -> LiveCosts:
        return self._others.get(work, self._greedy)

    def _turn_to(self, batch: int, work: Work) -> None:
        """Choose for another number of rows, or another draw, of rows that accept as much as these."""
        self._costs = self._live(work).costs_N(batch).tolist()
        if self._batch == 0:
            self._credit = self._FIRST_CREDIT * self._costs[0]
        self._batch, self._work = batch, work
        if self._change() and not self._is_probe:
            self._n, self._steps_left = self.widths[self._choice], min(self._steps_left, self._interval)

    def _decide(self) -> None:
        """Learn, choose, and perhaps start a probe, though not right after another."""
        live = self._live(self._work)
        live.learn()
        self._costs = live.costs_N(self._batch).tolist()
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
        n, cost, tokens = self.widths[self._choice], self._costs[self._choice], self._tokens[self._choice]
        limit = cost + self._credit / self._PROBE_STEPS
        affordable = [
            index
            for index, (width, width_cost, expected) in enumerate(
                zip(self.widths, self._costs, self._tokens, strict=True)
            )
            if width != n and width_cost + cost * max(0.0, 1 - expected / tokens) <= limit
        ]
        if not affordable:
            return None
        lowest = self._live(self._work).lowest_N(self._batch)
        most = _tokens([(size, half.at_best(n)) for size, half in rates], self.widths)
        speed, best = max((most[index] / lowest[index], index) for index in affordable)
        if speed <= (1 + self.hysteresis) * tokens / cost:
            return None
        self._credit = 0.0
        return self.widths[best]


def _tokens(rates: Halves, widths: Sequence[int]) -> list[float]:
    """What a step of each width is expected to commit to all rows: a wider one at least what a narrower one does."""
    means = zip(*(half.expected(widths) for _, half in rates), strict=True)
    tokens = [sum(size * mean for (size, _), mean in zip(rates, halves, strict=True)) for halves in means]
    return list(accumulate(tokens, max))
