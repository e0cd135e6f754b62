"""Fast-forwarded and stationary tokens of recorded trajectories (paper section 4.2)."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from cllm.decoding.records import BlockTrajectory, DecodeResult


@dataclass(frozen=True, slots=True)
class TrajectoryCounts:
    """Sums over blocks; one iteration is one forward pass."""

    blocks: int
    iterations: int
    committed: int  # tokens of the responses
    stationary: int  # tokens that were right, and stayed so, while a token before them was still wrong

    @property
    def fast_forwarded(self) -> float:
        """Tokens committed per iteration, the one that is right for free included; 1 is AR."""
        return self.committed / self.iterations

    @property
    def stationary_per_block(self) -> float:
        return self.stationary / self.blocks


def count_trajectory(result: DecodeResult) -> TrajectoryCounts:
    """Counts of one response that was decoded with recording; tokens behind its end are not counted."""
    size = len(result.trajectory[0].fixed_point)
    iterations = committed = stationary = 0
    for index, block in enumerate(result.trajectory):
        length = min(size, len(result.token_ids) - index * size)
        accepted = fast_forwarded(block, length)
        iterations += len(accepted)
        committed += sum(accepted)
        stationary += len(stationary_tokens(block, length))
    return TrajectoryCounts(len(result.trajectory), iterations, committed, stationary)


def add_counts(counts: Iterable[TrajectoryCounts]) -> TrajectoryCounts:
    rows = list(counts)
    return TrajectoryCounts(
        blocks=sum(row.blocks for row in rows),
        iterations=sum(row.iterations for row in rows),
        committed=sum(row.committed for row in rows),
        stationary=sum(row.stationary for row in rows),
    )


def fast_forwarded(block: BlockTrajectory, length: int) -> list[int]:
    """Tokens committed by each iteration: the contiguous prefix that its forward confirms, and the one behind it.

    Args:
        length: tokens of the block that belong to the response; the rest lies behind its end.
    """
    size = len(block.fixed_point)
    counts, done = [], 0
    for before, after in pairwise(block.states):
        end = done
        # The last token of a state is predicted but never fed, so no forward can confirm it.
        while end < size - 1 and before[end] == after[end]:
            end += 1
        counts.append(min(end + 1, length) - done)
        done = end + 1
    return counts


def stationary_tokens(block: BlockTrajectory, length: int) -> list[int]:
    """Positions, among the first `length`, whose token is right from some iteration on to the end of the block, while
    at that iteration a token before it is still wrong.

    The initial guess predicts nothing, so a token that it holds by luck counts from the first iteration on.
    """
    right = block.fixed_point
    found = []
    for position in range(length):
        since = len(block.states) - 1
        while since > 1 and block.states[since - 1][position] == right[position]:
            since -= 1
        if block.states[since][:position] != right[:position]:
            found.append(position)
    return found
