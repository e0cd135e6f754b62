"""Noticing an engine whose step loop stands still."""

import time
from collections.abc import Callable


class Watchdog:
    """Says whether steps have stood still for too long while requests wait for them.

    Args:
        stall_s: longer than any step, captured graphs and long prompts included.
        clock: seconds.
    """

    def __init__(self, stall_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._stall_s = stall_s
        self._clock = clock
        self._steps = -1
        self._moved_at = clock()

    def is_stuck(self, steps: int, num_unfinished: int) -> bool:
        """To be asked from time to time, with the number of steps so far."""
        now = self._clock()
        if num_unfinished == 0 or steps != self._steps:
            self._steps, self._moved_at = steps, now
        return now - self._moved_at > self._stall_s
