"""What a step costs: measured when the engine starts, and corrected by the steps that it takes. No tensors.

Shapes: N widths to choose from.
"""

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median
from typing import Literal

import numpy as np
import numpy.typing as npt

from cllm.errors import InputError

Floats = npt.NDArray[np.float64]
Work = Literal["greedy", "drawn", "adjusted"]
"""What the draw of a step takes: an argmax; noise as well; or also filters, penalties or log-probabilities."""


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
        self.batches = increasing("batches", batches)
        self.widths = increasing("widths", widths)
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


class LiveCosts:
    """A table of step times, corrected by the steps that are taken.

    The table knows the device's work on rows of one length; beside it stand the host's work, longer contexts, other
    settings of the sampler. What is learnt is a factor for each width, from medians, for what disturbs a step only ever
    adds time. While a width is in use, a drift of its factor is taken for one of all widths, since it mostly comes from
    rows and contexts; what a change of width brings to light is a matter of that width. A width that was never taken
    has a factor between those of its neighbours.

    Args:
        table: step times.
        widths: those of interest, increasing, all of them in the table.
    """

    _MEMORY = 16.0  # steps after which an observation weighs 1/e
    _FEWEST, _MOST = 3, 256  # steps that a median is taken of, and that wait for it
    _FRESH = 2048  # steps for which a width's time is taken for known

    def __init__(self, table: CostTable, widths: Sequence[int]) -> None:
        self.table = table
        self._widths = list(widths)
        self._columns_N = [table.widths.index(n) for n in widths]
        self._logs: dict[int, float] = {}  # logarithms of the factors of widths that were taken
        self._seen_at: dict[int, int] = {}
        self._logs_N = np.zeros(len(widths))
        self._steps: list[tuple[int, int, float]] = []
        self._num_steps = 0
        self._in_use = 0

    def observe(self, batch: int, n: int, milliseconds: float) -> None:
        """Note a step that nothing else was done beside: cheap, for it is called for every step."""
        self._steps.append((batch, n, milliseconds))
        if len(self._steps) == self._MOST:
            self.learn()

    def learn(self) -> None:
        """Correct the factors by the noted steps."""
        if not self._steps:
            return
        tables = {batch: self._table_N(batch) for batch in {batch for batch, _, _ in self._steps}}
        ratios = defaultdict(list)
        for batch, n, milliseconds in self._steps:
            ratios[n].append(milliseconds / tables[batch][self._widths.index(n)])
        self._num_steps += len(self._steps)
        self._steps.clear()
        for n, found in ratios.items():
            if len(found) >= self._FEWEST:
                self._correct(n, math.log(median(found)), len(found))
        if self._logs:
            known = sorted(self._logs.items())
            places, logs = np.log([n for n, _ in known]), [log for _, log in known]
            self._logs_N = np.interp(np.log(self._widths), places, logs)

    def costs_N(self, batch: int) -> Floats:
        """Milliseconds of a step for all widths."""
        return self._table_N(batch) * np.exp(self._logs_N)

    def lowest_N(self, batch: int) -> Floats:
        """The same, but for widths that were not taken lately as little as may be: by the least factor of any width."""
        oldest = self._num_steps - self._FRESH
        is_fresh_N = [self._seen_at.get(n, oldest) > oldest for n in self._widths]
        return self._table_N(batch) * np.exp(np.where(is_fresh_N, self._logs_N, min(0.0, self._logs_N.min())))

    def _correct(self, n: int, log: float, num_steps: int) -> None:
        change = (log - self._logs.get(n, log)) * -math.expm1(-num_steps / self._MEMORY)
        self._logs.setdefault(n, log)
        for width in list(self._logs) if n == self._in_use else [n]:
            self._logs[width] += change
        self._in_use, self._seen_at[n] = n, self._num_steps

    def _table_N(self, batch: int) -> Floats:
        return self.table.costs_N(batch)[self._columns_N]


def increasing(name: str, values: Sequence[int]) -> tuple[int, ...]:
    """The values as a tuple; InputError if they do not grow from 1 or more on."""
    if not values or values[0] < 1 or any(low >= high for low, high in pairwise(values)):
        raise InputError(f"{name} must be strictly increasing from 1 or more, got {list(values)}")
    return tuple(values)
