"""Which requests the next step decodes, which prompts it reads, and who owns the cache. No tensors.

Requests are admitted in the order of arrival. A running one grows block by block; when no block is left, the one
admitted last gives its blocks back and waits at the front, to be recomputed from its tokens.
"""

from collections import deque
from dataclasses import dataclass, field

from cllm.engine.blocks import BlockPool
from cllm.engine.sequence import Sequence
from cllm.errors import InputError


@dataclass(frozen=True, slots=True)
class Chunk:
    """Known tokens start .. start + count - 1 of a sequence, to be stored in the cache."""

    sequence: Sequence
    start: int
    count: int


@dataclass(slots=True)
class Plan:
    """One step: what changes on the device before it, prompts to read, rows to decode.

    Attributes:
        preempted: slots taken from sequences, before any of them is given away again.
        admitted: sequences that got a slot since the last plan.
        grown: (sequence, index of its first new block).
        chunks: prompt pieces to store before decoding.
        rows: sequences to decode.
    """

    preempted: list[int] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    grown: list[tuple[Sequence, int]] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    rows: list[Sequence] = field(default_factory=list)

    @property
    def only_decodes(self) -> bool:
        """Whether the step does nothing but decode rows that were there before."""
        return not self.admitted and not self.chunks


class Scheduler:
    """Iteration-level continuous batching.

    Args:
        pool: the cache's blocks.
        max_rows: slots, sequences that run together.
        max_tokens: longest sequence, prompt and response.
        prefill_tokens: prompt tokens read in one step.
        growth_blocks: blocks that a running sequence takes at once, while there are plenty.
        overhang: tokens that a step may store behind a sequence's longest length, and read again.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_rows: int,
        max_tokens: int,
        prefill_tokens: int,
        growth_blocks: int = 4,
        overhang: int = 0,
    ) -> None:
        self.pool = pool
        self.max_tokens = max_tokens
        self.prefill_tokens = prefill_tokens
        self.growth_blocks = growth_blocks
        self.overhang = overhang
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in the order of admission
        self._slots = list(range(max_rows - 1, -1, -1))

    def add(self, sequence: Sequence) -> None:
        """Queue a request.

        Raises:
            InputError: it is longer than the context, or than the whole cache.
        """
        request = sequence.request
        length = f"{sequence.num_prompt} prompt tokens and max_new_tokens={request.max_new_tokens}"
        if sequence.max_length > self.max_tokens:
            raise InputError(f"{length} make {sequence.max_length}, the engine's max_tokens is {self.max_tokens}")
        if self._most_blocks(sequence) > self.pool.num_blocks - 1:
            raise InputError(
                f"{length} need {self._most_blocks(sequence)} cache blocks, there are {self.pool.num_blocks - 1}"
            )
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, waiting or running: it is finished or aborted."""
        if sequence.slot is None:
            self.waiting.remove(sequence)
        else:
            self._evict(sequence)

    def plan(self, window: int) -> Plan:
        """The next step with windows of up to `window` tokens. The rows may be fewer than are running."""
        plan = Plan()
        self._grow(plan, window)
        self._admit(plan, window)
        self._read_prompts(plan)
        plan.rows = [sequence for sequence in self.running if sequence.is_prefilled]
        return plan

    def _grow(self, plan: Plan, window: int) -> None:
        """Blocks for what the running sequences may store in this step, oldest first."""
        for sequence in list(self.running):
            if sequence.slot is None:
                continue  # preempted by an older one
            first = len(sequence.blocks)
            missing = self._blocks_needed(sequence, window) - first
            if missing <= 0:
                continue
            while not self._extend(sequence, missing):
                victim = self.running[-1]
                plan.preempted.append(victim.place)
                self._preempt(victim)
                if victim is sequence:
                    break
            if sequence.slot is not None:
                plan.grown.append((sequence, first))
        plan.grown = [(sequence, first) for sequence, first in plan.grown if sequence.slot is not None]

    def _admit(self, plan: Plan, window: int) -> None:
        while self.waiting and self._slots:
            sequence = self.waiting[0]
            # The last known token is fed by the first window, whose keys are its own: it is never part of a prefix.
            matched = self.pool.match(self._digests(sequence, len(sequence.tokens) - 1))
            sequence.blocks = list(matched)
            missing = self._blocks_needed(sequence, window) - len(matched)
            # a block for each running sequence that is still to grow, else it would soon preempt the new one
            spare = sum(len(row.blocks) < self._most_blocks(row) for row in self.running)
            if self.pool.num_available < missing + spare or not self._extend(sequence, missing):
                self.pool.release(matched)
                sequence.blocks = []
                return
            self.waiting.popleft()
            sequence.num_stored = len(matched) * self.pool.block_tokens
            sequence.slot = self._slots.pop()
            sequence.admissions += 1
            self.running.append(sequence)
            plan.admitted.append(sequence)

    def _read_prompts(self, plan: Plan) -> None:
        budget = self.prefill_tokens
        for sequence in self.running:
            if sequence.is_prefilled:
                continue
            if budget == 0:
                return
            start, count = sequence.num_stored, min(budget, len(sequence.tokens) - 1 - sequence.num_stored)
            plan.chunks.append(Chunk(sequence, start, count))
            sequence.num_stored += count
            budget -= count
            self._publish(sequence, start // self.pool.block_tokens)

    def _publish(self, sequence: Sequence, first: int) -> None:
        """Offer the prompt's blocks that are stored, from number `first` on, to sequences with the same beginning.

        Later steps run after this one on the device, so the content is there before anyone reads it.
        """
        digests = self._digests(sequence, min(sequence.num_stored, sequence.num_prompt))
        self.pool.publish(digests[first:], sequence.blocks[first : len(digests)])

    def _digests(self, sequence: Sequence, end: int) -> list[bytes]:
        return self.pool.digests(sequence.tokens, end, sequence.digests)

    def _blocks_needed(self, sequence: Sequence, window: int) -> int:
        last = len(sequence.tokens) + sequence.num_in_flight + window - 1
        return min(self.pool.blocks_for(last), self._most_blocks(sequence))

    def _most_blocks(self, sequence: Sequence) -> int:
        return self.pool.blocks_for(sequence.max_length + self.overhang)

    def _extend(self, sequence: Sequence, missing: int) -> bool:
        """Give the sequence `missing` blocks, and some more while the cache is rather empty."""
        if missing <= 0:
            return True
        if self.pool.num_available > self.pool.num_blocks // 4:
            most = self._most_blocks(sequence) - len(sequence.blocks)
            missing = max(missing, min(self.growth_blocks, most, self.pool.num_available))
        blocks = self.pool.allocate(missing)
        sequence.blocks += blocks or []
        return blocks is not None

    def _preempt(self, sequence: Sequence) -> None:
        self._evict(sequence)
        self.waiting.appendleft(sequence)

    def _evict(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        self.running.remove(sequence)
        self._slots.append(sequence.slot)
        self.pool.release(sequence.blocks)
        sequence.slot, sequence.blocks, sequence.num_stored, sequence.num_in_flight = None, [], 0, 0

    def check(self) -> None:
        """Assert that slots and blocks are consistent (for tests)."""
        slots = [sequence.slot for sequence in self.running]
        assert None not in slots
        assert len(set(slots)) == len(slots), "two sequences share a slot"
        assert not set(slots) & set(self._slots), "a used slot is free"
        assert all(sequence.slot is None and not sequence.blocks for sequence in self.waiting)
        self.pool.check([sequence.blocks for sequence in self.running])
