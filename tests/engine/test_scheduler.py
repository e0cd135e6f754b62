"""Scheduler and block pool: the books are right after every step, whatever happens."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.decoding.records import DecodeRequest
from cllm.engine.blocks import BlockPool
from cllm.engine.scheduler import Plan, Scheduler
from cllm.engine.sequence import Sequence
from cllm.errors import InputError

MAX_TOKENS = 48


def make_scheduler(num_blocks: int = 13, max_rows: int = 4, prefill_tokens: int = 16, overhang: int = 0) -> Scheduler:
    return Scheduler(
        BlockPool(num_blocks, block_tokens=4),
        max_rows=max_rows,
        max_tokens=MAX_TOKENS,
        prefill_tokens=prefill_tokens,
        growth_blocks=2,
        overhang=overhang,
    )


def make_sequence(key: int, num_prompt: int, new_tokens: int, first: int = 0) -> Sequence:
    prompt = tuple((first + i) % 7 for i in range(num_prompt))
    return Sequence(key, DecodeRequest(prompt, new_tokens), frozenset([99]))


class Simulation:
    """Plays the engine, a step in flight: commits random numbers of tokens, adds and aborts at random."""

    def __init__(self, seed: int, scheduler: Scheduler) -> None:
        self.rng = random.Random(seed)
        self.scheduler = scheduler
        self.alive: dict[int, Sequence] = {}
        self.in_flight: list[tuple[Sequence, int, int]] = []
        self.finished: list[int] = []
        self.aborted = self.added = self.preempted = 0

    def step(self, *, adding: bool = True) -> None:
        if adding and self.rng.random() < 0.2 and len(self.alive) < 12:
            self.add()
        if adding and self.alive and self.rng.random() < 0.02:
            sequence = self.alive.pop(self.rng.choice(list(self.alive)))
            self.scheduler.remove(sequence)
            self.aborted += 1
        window = self.rng.choice([1, 2, 5, 8])
        running = set(map(id, self.scheduler.running))
        plan = self.scheduler.plan(window)
        self.preempted += len(running - set(map(id, self.scheduler.running)))
        self.check_plan(plan, window)
        launched = [(row, row.admissions, window) for row in plan.rows]
        for row in plan.rows:
            row.num_in_flight += window
        self.read(self.in_flight)
        self.in_flight = launched
        self.scheduler.check()

    def add(self) -> None:
        sequence = make_sequence(self.added, self.rng.randint(1, 24), self.rng.randint(1, 24), self.rng.randint(0, 1))
        self.scheduler.add(sequence)
        self.alive[sequence.key] = sequence
        self.added += 1

    def check_plan(self, plan: Plan, window: int) -> None:
        assert sum(chunk.count for chunk in plan.chunks) <= self.scheduler.prefill_tokens
        for row in plan.rows:
            last = min(len(row.tokens) + row.num_in_flight + window - 1, row.max_length + self.scheduler.overhang)
            assert len(row.blocks) * 4 >= last, "a row has no room for what the step may store and read again"

    def read(self, launched: list[tuple[Sequence, int, int]]) -> None:
        for row, admission, window in launched:
            if row.slot is None or row.admissions != admission:
                continue
            row.num_in_flight -= window
            count = min(self.rng.randint(1, window), row.max_length - len(row.tokens))
            tokens = [self.rng.choice([1, 2, 3, 99]) if self.rng.random() < 0.1 else 1 for _ in range(window)]
            row.advance(tokens, count)
            if row.finish_reason is not None:
                self.scheduler.remove(row)
                del self.alive[row.key]
                self.finished.append(row.key)


def test_books_are_right_over_100_000_random_steps():
    steps = preempted = 0
    for seed in range(20):
        overhang = 7 * (seed % 2)
        simulation = Simulation(seed, make_scheduler(num_blocks=13 + overhang, overhang=overhang))
        for _ in range(5000):
            simulation.step()
        while simulation.alive:
            simulation.step(adding=False)
        steps += 5000
        preempted += simulation.preempted
        assert len(simulation.finished) == len(set(simulation.finished)) == simulation.added - simulation.aborted
        assert not simulation.scheduler.waiting
        assert simulation.scheduler.pool.num_available == simulation.scheduler.pool.num_blocks - 1
    assert steps >= 100_000
    assert preempted > 1000


def test_requests_are_admitted_in_order_of_arrival():
    scheduler = make_scheduler(num_blocks=100, max_rows=2)
    sequences = [make_sequence(key, 3, 3) for key in range(4)]
    for sequence in sequences:
        scheduler.add(sequence)
    assert scheduler.plan(1).admitted == sequences[:2]
    scheduler.remove(sequences[0])
    assert scheduler.plan(1).admitted == [sequences[2]]


def test_long_prompt_is_read_in_chunks_while_others_decode():
    scheduler = make_scheduler(num_blocks=100, prefill_tokens=8)
    short, long = make_sequence(0, 3, 8), make_sequence(1, 24, 8)
    scheduler.add(short)
    scheduler.add(long)
    counts, decoded = [], []
    for _ in range(4):
        plan = scheduler.plan(1)
        counts.append(sum(chunk.count for chunk in plan.chunks if chunk.sequence is long))
        decoded.append([row.key for row in plan.rows])
    assert counts == [6, 8, 8, 1]
    assert decoded == [[0], [0], [0], [0, 1]]


def test_preempted_sequence_waits_first_and_is_recomputed():
    scheduler = make_scheduler(num_blocks=8, max_rows=3)
    old, young, third = (make_sequence(key, 8, 20, first=key) for key in range(3))
    scheduler.add(old)
    scheduler.add(young)
    scheduler.plan(1)
    scheduler.add(third)
    while young.slot is not None:
        for row in scheduler.plan(4).rows:
            row.advance([1, 2, 3, 4], 2)
    assert list(scheduler.waiting) == [young, third]
    assert (young.num_stored, young.blocks) == (0, [])
    scheduler.check()


@pytest.mark.parametrize(("prompt", "new", "message"), [(40, 20, "max_tokens is 48"), (24, 24, "12 cache blocks")])
def test_request_that_can_never_run_is_refused(prompt, new, message):
    scheduler = make_scheduler(num_blocks=8)
    with pytest.raises(InputError, match=message):
        scheduler.add(make_sequence(0, prompt, new))
    assert not scheduler.waiting


def test_shared_prompt_is_read_once():
    scheduler = make_scheduler(num_blocks=100)
    first, second = make_sequence(0, 15, 3), make_sequence(1, 15, 3)
    scheduler.add(first)
    assert sum(chunk.count for chunk in scheduler.plan(1).chunks) == 14
    scheduler.add(second)
    assert sum(chunk.count for chunk in scheduler.plan(1).chunks) == 2  # three blocks of four tokens are there
    assert first.blocks[:3] == second.blocks[:3]
    assert first.blocks[3] != second.blocks[3]


def test_content_outlives_its_owner_until_room_is_needed():
    pool = BlockPool(4, block_tokens=2)
    digests = pool.digests([1, 2, 3, 4, 5], 5, [])
    blocks = pool.allocate(2)
    pool.publish(digests, blocks)
    pool.release(blocks)
    assert pool.match(digests) == blocks
    pool.release(blocks)
    assert len(pool.allocate(3)) == 3
    assert pool.match(digests) == []
    assert pool.allocate(1) is None


class CountingTokens(list):
    """Counts the tokens that are read by slices."""

    num_read = 0

    def __getitem__(self, place):
        found = super().__getitem__(place)
        if isinstance(place, slice):
            self.num_read += len(found)
        return found


def test_a_long_prompt_is_hashed_once_however_often_it_waits_and_in_however_many_chunks_it_is_read():
    scheduler = make_scheduler(num_blocks=12, prefill_tokens=4)
    first, second = make_sequence(0, 24, 8), make_sequence(1, 24, 8, first=1)
    scheduler.add(first)
    scheduler.plan(1)
    second.tokens = CountingTokens(second.tokens)
    scheduler.add(second)
    for _ in range(5):
        scheduler.plan(1)
    assert second.slot is None
    scheduler.remove(first)
    for _ in range(8):
        scheduler.plan(1)
    assert second.is_prefilled
    assert second.tokens.num_read <= 24
    assert len(set(second.digests)) == 5  # its last token is never part of a prefix
    scheduler.check()


def test_digests_tell_prefixes_apart_and_grow_with_their_tokens():
    pool, known = BlockPool(4, block_tokens=2), []
    tokens = [1, 2, 3, 4, 1, 2]
    assert len(pool.digests(tokens, 3, known)) == 1
    digests = pool.digests(tokens, 6, known)
    assert digests == pool.digests(tokens, 6, []) == known
    assert len(set(digests)) == 3
    assert pool.digests(tokens, 5, known) == digests[:2]
    assert pool.digests([2, 2, 3, 4], 4, [])[1] != digests[1]


def test_slots_of_preempted_sequences_are_told():
    scheduler = make_scheduler(num_blocks=8, max_rows=3)
    old, young = make_sequence(0, 8, 20), make_sequence(1, 8, 20, first=1)
    scheduler.add(old)
    scheduler.add(young)
    slots, preempted = [row.slot for row in scheduler.plan(1).rows], []
    while young.slot is not None:
        plan = scheduler.plan(4)
        preempted += plan.preempted
        for row in plan.rows:
            row.advance([1, 2, 3, 4], 2)
    assert preempted == [slots[1]]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(0, 1), max_size=9), max_size=8), st.booleans())
def test_match_finds_the_longest_known_beginning(prompts, reuse):
    pool = BlockPool(100, block_tokens=2, reuse_prefixes=reuse)
    known: set[tuple[int, ...]] = set()
    for prompt in prompts:
        digests = pool.digests(prompt, len(prompt), [])
        matched = pool.match(digests)
        expected = 0
        while reuse and tuple(prompt[: 2 * expected + 2]) in known and 2 * expected + 2 <= len(prompt):
            expected += 1
        assert len(matched) == expected
        blocks = matched + pool.allocate(pool.blocks_for(len(prompt)) - expected)
        pool.publish(digests, blocks[: len(digests)])
        known |= {tuple(prompt[:end]) for end in range(2, len(prompt) + 1, 2)}
        pool.release(blocks)
        pool.check([])
