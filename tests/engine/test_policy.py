"""Windows chosen in simulation: against the best fixed window and against AR, for several machines and kinds of rows.

A simulated guess holds with a probability that depends on its place in the window and on whether it was carried over
from the step before or is an initial guess. Time is what the cost table says; every random number is seeded.

Other simulations share nothing with the policy's view of the world: their steps take other times than the table says,
and their guesses come in easy and hard stretches of text.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm.engine.acceptance import Acceptance, Rates, _count
from cllm.engine.costs import CostTable, LiveCosts
from cllm.engine.policy import AdaptiveWindow, FixedWindow, WindowPolicy
from cllm.errors import InputError

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
WIDTHS = (1, 2, 4, 8, 16)
TOKENS = {1: 6_000, 8: 12_000, 32: 24_000, 128: 48_000}  # simulated for each batch

MACHINES: dict[str, Callable[[int, int], float]] = {
    "flat to 256 tokens": lambda b, n: 3.1 * max(b * n / 256, 1) + 0.0005 * b * n,
    "rising to 256 tokens": lambda b, n: 3.1 * max(b * n / 256, 1) + 0.004 * b * n + 0.01 * b,
    "linear": lambda b, n: 4.0 + b * n,
}
TABLES = {name: CostTable.measure(time_step, BATCHES, WIDTHS) for name, time_step in MACHINES.items()}

PLACES = np.arange(WIDTHS[-1] - 1)
CARRIED_FRESH = {
    "never": (0.0 * PLACES, 0.0 * PLACES),
    "teacher": (0.03 + 0.0 * PLACES, 0.03 + 0.0 * PLACES),  # 1.03 tokens a step
    "cllm": (0.75 + 0.0 * PLACES, 0.75 + 0.0 * PLACES),
    "jacobi": (0.82 + 0.0 * PLACES, 0.05 + 0.0 * PLACES),  # initial guesses are nearly worthless
    "rising": (1 - 0.45 * 0.8**PLACES, 1 - 0.45 * 0.8**PLACES),
    "falling": (0.9 * 0.85**PLACES, 0.9 * 0.85**PLACES),
}
KINDS = list(CARRIED_FRESH)
CARRIED, FRESH = (np.array([CARRIED_FRESH[kind][i] for kind in KINDS]) for i in range(2))

# Kind of the serial-th row, opened when `progress` of all tokens were done.
MIXTURES: dict[str, Callable[[float, int], str]] = {
    **{kind: lambda progress, serial, kind=kind: kind for kind in KINDS},
    "teacher and cllm": lambda progress, serial: ("teacher", "cllm")[serial % 2],
    "teacher and jacobi": lambda progress, serial: ("teacher", "jacobi")[serial % 2],
    "teacher, then cllm": lambda progress, serial: "cllm" if progress > 0.5 else "teacher",
    "cllm, then teacher": lambda progress, serial: "teacher" if progress > 0.5 else "cllm",
    "teacher, then jacobi": lambda progress, serial: "jacobi" if progress > 0.5 else "teacher",
}


LENGTH = 128  # tokens of a response


@dataclass
class Outcome:
    milliseconds: float = 0.0
    chosen: list[int] = field(default_factory=list)


def luck(key: int) -> np.ndarray:
    """A uniform number for each position of a row: the same for every policy, so that comparisons have little noise."""
    return np.random.default_rng(key).random(LENGTH + WIDTHS[-1])


def simulate(policy: WindowPolicy, machine: str, batch: int, mixture: str, tokens: int) -> Outcome:
    """Continuous batching: a row that has its tokens is replaced by a new one. Time per token, times `tokens`."""
    keys = list(range(batch))
    kind = np.array([KINDS.index(MIXTURES[mixture](0.0, key)) for key in keys])
    draws = np.array([luck(key) for key in keys])
    position, carried = np.arange(batch) * 61 % LENGTH, np.zeros(batch, dtype=int)
    outcome, done, serial = Outcome(), 0, batch
    while done < tokens:
        n = policy.choose(keys)
        outcome.chosen.append(n)
        outcome.milliseconds += TABLES[machine].cost(batch, n)
        rate = np.where(carried[:, None] > PLACES, CARRIED[kind], FRESH[kind])[:, : n - 1]
        holds = np.take_along_axis(draws, position[:, None] + PLACES, 1)[:, : n - 1] < rate
        accepted = 1 + holds.cumprod(1).sum(1)
        carried = np.maximum(carried, n) - accepted
        done += int(np.minimum(accepted, LENGTH - position).sum())
        position += accepted
        for row in (position < LENGTH).nonzero()[0].tolist():
            policy.observe(keys[row], n, int(accepted[row]))
        for row in (position >= LENGTH).nonzero()[0].tolist():
            policy.forget(keys[row])
            keys[row] = serial
            kind[row] = KINDS.index(MIXTURES[mixture](done / tokens, serial))
            draws[row] = luck(serial)
            position[row] = carried[row] = 0
            serial += 1
    outcome.milliseconds *= tokens / done
    return outcome


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("batch", [8, 32, *(pytest.param(batch, marks=pytest.mark.slow) for batch in (1, 128))])
@pytest.mark.parametrize("machine", MACHINES)
def test_close_to_the_best_fixed_window_and_never_slower_than_ar(machine, batch, mixture):
    tokens = TOKENS[batch]
    ar = tokens / batch * TABLES[machine].cost(batch, 1)
    fixed = [simulate(FixedWindow(n), machine, batch, mixture, tokens).milliseconds for n in WIDTHS[1:]]
    adaptive = simulate(AdaptiveWindow(TABLES[machine], WIDTHS), machine, batch, mixture, tokens)
    assert adaptive.milliseconds <= 1.03 * min(ar, *fixed)
    assert adaptive.milliseconds <= 1.02 * ar


@dataclass(frozen=True)
class World:
    """Rows of a text whose stretches are easy or hard, on a machine that its table does not describe.

    Attributes:
        true_ms: milliseconds of a step of so many rows and tokens a row.
        easy, hard: tokens that a step would accept at most, drawn for each stretch of text between these bounds.
        length: tokens of a response.
    """

    true_ms: Callable[[int, int], float]
    easy: tuple[int, int]
    hard: tuple[int, int]
    length: int

    def milliseconds(self, policy: WindowPolicy, batch: int, tokens: int, seed: int = 0) -> float:
        """For at least `tokens` tokens, scaled to them."""
        rng = np.random.default_rng(seed)
        keys, left, serial = list(range(batch)), rng.integers(1, self.length, batch), batch
        reach = np.ones(batch, dtype=int)
        time, done = 0.0, 0
        while done < tokens:
            n = policy.choose(keys)
            time += self.true_ms(batch, n)
            # What a clock reads: some jitter, and a disturbance now and then, which is nobody's fault.
            noise = (1 + 0.05 * rng.random()) * (5 if rng.random() < 0.02 else 1)
            policy.measured(batch, n, self.true_ms(batch, n) * noise)
            moves = rng.random(batch) < 0.2
            bounds = np.where((rng.random(batch) < 0.5)[:, None], self.easy, self.hard)
            reach = np.where(moves, rng.integers(bounds[:, 0], bounds[:, 1] + 1), reach)
            accepted = np.minimum(np.minimum(reach, n), left)
            done += int(accepted.sum())
            left -= accepted
            for row in range(batch):
                if left[row] > 0:
                    policy.observe(keys[row], n, int(accepted[row]))
                else:
                    policy.forget(keys[row])
                    keys[row], left[row], reach[row] = serial, self.length, 1
                    serial += 1
        return time * tokens / done


FLAT = CostTable.measure(lambda b, n: 3.0 + 0.001 * b * n, BATCHES, WIDTHS)  # every window looks nearly free
STEEP = CostTable.measure(lambda b, n: 3.0 * n**0.9, BATCHES, WIDTHS)  # none looks worth its time
WORLDS = {
    "windows are dear": (FLAT, World(lambda b, n: 3.0 + 0.9 * (n - 1), (3, 6), (1, 2), 100)),
    "windows are very dear": (FLAT, World(lambda b, n: 3.0 * n, (3, 9), (1, 1), 100)),
    "the host decides": (STEEP, World(lambda b, n: 9.0 + 0.02 * n, (4, 9), (1, 3), 100)),
    "short answers": (FLAT, World(lambda b, n: 3.0 + 0.4 * (n - 1), (3, 6), (1, 2), 12)),
    "a step at 64 tokens": (FLAT, World(lambda b, n: 3.0 * (1 + (b * n > 64)), (3, 6), (1, 2), 60)),
    "nothing holds": (FLAT, World(lambda b, n: 3.0 + 0.2 * n, (1, 1), (1, 1), 60)),
}


@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("name", WORLDS)
def test_not_slower_than_ar_where_the_table_is_wrong(name, batch):
    table, world = WORLDS[name]
    tokens = 6_000 if batch == 1 else 3_000 * batch
    fixed = [world.milliseconds(FixedWindow(n), batch, tokens) for n in WIDTHS]
    adaptive = world.milliseconds(AdaptiveWindow(table, WIDTHS), batch, tokens)
    assert adaptive <= 1.03 * fixed[0]
    # A table that is wrong by a factor of 12 is unlearnt by affordable probes, width after width.
    assert adaptive <= (2.0 if table is STEEP else 1.12) * min(fixed)


def test_the_table_alone_would_be_slower_than_ar():
    """What the last test is there for: without measured steps the policy believes its table."""

    class Unheard(AdaptiveWindow):
        def measured(self, batch, n, milliseconds, work="greedy"):
            pass

    table, world = WORLDS["windows are very dear"]
    ar = world.milliseconds(FixedWindow(1), 8, 24_000)
    assert world.milliseconds(Unheard(table, WIDTHS), 8, 24_000) > 1.2 * ar


def test_live_costs_learn_ratios_and_forgive_disturbances():
    table = CostTable([1, 8], [1, 4], [[1.0, 1.0], [1.0, 2.0]])
    live, rng = LiveCosts(table, [1, 4]), np.random.default_rng(0)
    for _ in range(200):
        live.observe(8, 1, 3.0 + (40 if rng.random() < 0.1 else 0))
        live.observe(8, 4, 3.0 + (40 if rng.random() < 0.1 else 0))
    live.learn()
    slow, fast = live.costs_N(8)[::-1]
    assert slow / fast == pytest.approx(1.0, rel=0.05)
    assert live.costs_N(1)[1] / live.costs_N(1)[0] == pytest.approx(0.5, rel=0.05)


def test_a_drift_is_taken_for_one_of_all_widths_and_a_change_of_width_tells_them_apart():
    live = LiveCosts(CostTable([1], [1, 2, 4, 8], [[1.0, 2.0, 4.0, 8.0]]), [1, 2, 4, 8])

    def take(n, milliseconds):
        for _ in range(10):
            for _ in range(20):
                live.observe(1, n, milliseconds)
            live.learn()
        return live.costs_N(1)

    assert take(1, 1.0) == pytest.approx([1, 2, 4, 8])
    assert take(4, 16.0) == pytest.approx([1, 4, 16, 32], rel=0.01)  # 2 lies between, 8 is as the nearest
    assert take(4, 32.0) == pytest.approx([2, 8, 32, 64], rel=0.01)  # longer contexts, say
    assert live.lowest_N(1) == pytest.approx([2, 2, 32, 8], rel=0.01)
    again = take(1, 4.0)
    assert again[0] == pytest.approx(4, rel=0.01)
    assert again[2] < 40  # not 64: its own time was not measured


def test_a_draw_that_costs_more_takes_a_narrower_window():
    """Greedy steps hide their guesses, sampled ones pay for each; the same rows accept the same."""
    steep = CostTable.measure(lambda b, n: 3.0 + 0.5 * b * n, BATCHES, WIDTHS)
    policy = AdaptiveWindow(FLAT, WIDTHS, others={"drawn": steep})
    chosen = {}
    for work in ("greedy", "drawn", "adjusted", "greedy"):
        for _ in range(60):
            n = policy.choose(range(8), work)
            for row in range(8):
                policy.observe(row, n, min(n, 3))
        chosen[work] = n
    assert chosen["greedy"] == chosen["adjusted"] >= 4
    assert chosen["drawn"] < chosen["greedy"]
    with pytest.raises(InputError, match=r"\[16\] not in the table"):
        AdaptiveWindow(FLAT, WIDTHS, others={"drawn": CostTable([1], WIDTHS[:-1], [[1.0] * 4])})


@pytest.mark.parametrize("batch", TOKENS)
@pytest.mark.parametrize("machine", ["rising to 256 tokens", "linear"])
def test_a_model_that_accepts_nothing_decodes_as_ar(machine, batch):
    tokens = TOKENS[batch]
    outcome = simulate(AdaptiveWindow(TABLES[machine], WIDTHS), machine, batch, "never", tokens)
    assert outcome.milliseconds <= 1.015 * tokens / batch * TABLES[machine].cost(batch, 1)
    later = outcome.chosen[len(outcome.chosen) // 2 :]
    assert later.count(1) > 0.8 * len(later)


def test_probes_find_acceptance_that_comes_back():
    """n is 1 for thousands of steps; when the rows change, some probes are enough."""
    outcome = simulate(AdaptiveWindow(TABLES["linear"], WIDTHS), "linear", 1, "teacher, then jacobi", 8_000)
    assert outcome.chosen[3000:3800].count(1) > 700
    assert set(outcome.chosen[-200:]) <= {4, 8, 16}


def test_gains_below_the_hysteresis_change_nothing():
    """Where all widths are within two percent of each other, only probes leave the width."""
    table = CostTable.measure(lambda b, n: 3.1 * (1 + 0.02 * (n > 1)), BATCHES, WIDTHS)
    policy = AdaptiveWindow(table, WIDTHS, probe_share=0.0)
    rng = np.random.default_rng(0)
    chosen = []
    for _ in range(2000):
        chosen.append(policy.choose(["row"]))
        policy.observe("row", chosen[-1], 1 + int(chosen[-1] > 1 and rng.random() < 0.03))
    assert sum(a != b for a, b in pairwise(chosen[100:])) <= 2


def test_probes_keep_to_their_share_of_time():
    """The machine makes wide windows dear, and nothing is ever accepted: all time beyond AR's went into probes."""
    table = TABLES["linear"]
    for share in (0.002, 0.01, 0.05):
        policy = AdaptiveWindow(table, WIDTHS, probe_share=share)
        chosen = []
        for _ in range(6000):
            chosen.append(policy.choose(["row"]))
            policy.observe("row", chosen[-1], 1)
        wasted = sum(table.cost(1, n) - table.cost(1, 1) for n in chosen[100:])
        assert 0 < wasted <= share * len(chosen) * table.cost(1, 1)


def test_batch_decides_the_window():
    """The same rows: wide windows while the batch is small, narrow ones when it fills the machine."""
    policy = AdaptiveWindow(TABLES["flat to 256 tokens"], WIDTHS)
    for _ in range(60):
        n = policy.choose(range(8))
        for row in range(8):
            policy.observe(row, n, max(1, n // 2))
    assert policy.choose(range(4)) == 16
    n = policy.choose(range(128))
    assert n < 16
    assert policy.choose([]) == n
    assert policy.choose(range(4)) == 16


class CountingAcceptance(Acceptance):
    """Counts how often a decision asks for rates."""

    num_decisions = 0

    def rates(self):
        self.num_decisions += 1
        return super().rates()


@pytest.mark.parametrize("batch", [1, 8])
def test_decisions_that_agree_become_rare_and_new_rows_bring_one(batch):
    policy = AdaptiveWindow(TABLES["flat to 256 tokens"], WIDTHS)
    policy.acceptance = counting = CountingAcceptance(WIDTHS[-1])

    def decisions(steps: int, rows: range) -> int:
        before = counting.num_decisions
        for _ in range(steps):
            n = policy.choose(rows)
            for row in rows:
                policy.observe(row, n, max(1, n // 2))
        return counting.num_decisions - before

    decisions(400, range(batch))
    assert 0 < decisions(640, range(batch)) <= 40
    while decisions(1, range(batch)) == 0:
        pass
    assert decisions(1, range(batch)) == 0
    for row in range(batch):
        policy.forget(row)
    assert decisions(1, range(batch, 2 * batch)) == 1


def test_batches_beyond_the_table_take_a_window():
    """Ever larger ones cost in proportion, so that the window is that of the largest one measured."""
    policy = AdaptiveWindow(TABLES["flat to 256 tokens"], WIDTHS)
    for _ in range(60):
        n = policy.choose(range(128))
        for row in range(128):
            policy.observe(row, n, max(1, n // 2))
    assert policy.choose(range(128)) == policy.choose(range(1000))


@pytest.mark.parametrize(("carried", "fresh"), [(0.8, 0.05), (0.5, 0.5), (0.02, 0.01), (0.95, 0.3)])
@pytest.mark.parametrize("n", [1, 2, 5, 16])
def test_expected_tokens_are_the_mean_of_the_chain(carried, fresh, n):
    rng = np.random.default_rng(0)
    ready, total, steps = 0, 0, 20_000
    for _ in range(steps):
        accepted = 1
        while accepted < n and rng.random() < (carried if accepted <= ready else fresh):
            accepted += 1
        ready = n - accepted
        total += accepted
    one, mean = Rates(np.array([1.0] + [carried] * 15), fresh).expected([1, n])
    assert one == 1
    assert mean == pytest.approx(total / steps, rel=0.04)


@given(
    st.lists(
        st.lists(st.integers(1, 6).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), max_size=8),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 5),
)
def test_steps_counted_at_once_are_those_counted_one_by_one(rows, carried_before):
    """Rows of (n, accepted), with steps missing at their ends."""
    num_steps = 1 + max(map(len, rows))
    steps = np.array([[(carried_before, 0), *row, *[(0, 0)] * (num_steps - 1 - len(row))] for row in rows])
    counts, left = _count(*steps.transpose(2, 1, 0), 6)
    expected, carried = np.zeros((len(rows), 2, 6), dtype=int), [carried_before] * len(rows)
    for i, row in enumerate(rows):
        for n, accepted in row:
            for level in range(2, min(accepted + 1, n) + 1):
                entry = level - 1 if level <= 1 + carried[i] else 0
                expected[i, :, entry] += level <= accepted, 1
            carried[i] = max(carried[i], n) - accepted
    assert left.tolist() == carried
    assert (counts == expected).all()


def test_survival_beyond_the_window_is_extrapolated_geometrically():
    """Width 4 shows guesses that hold half the time; the estimate for 16 follows the same rate."""
    acceptance, rng = Acceptance(16), np.random.default_rng(0)
    for _ in range(3000):
        accepted = 1
        while accepted < 4 and rng.random() < 0.5:
            accepted += 1
        acceptance.observe("row", 4, accepted)
    ((_, rates),) = acceptance.rates()
    assert rates.carried_K[1:4] == pytest.approx(0.5, abs=0.1)
    assert rates.carried_K[4:] == pytest.approx(0.5, abs=0.15)


def test_a_step_says_nothing_about_guesses_it_did_not_reach():
    acceptance = Acceptance(8)
    for _ in range(50):
        acceptance.observe("row", 8, 2)  # guess 1 holds, guess 2 does not
    ((_, rates),) = acceptance.rates()
    assert rates.carried_K[1] > 0.95
    assert rates.carried_K[2] < 0.05
    for _ in range(200):
        acceptance.observe("row", 2, 2)  # cannot say anything about guess 2
    ((_, after),) = acceptance.rates()
    assert after.carried_K[2] < 0.2


def test_a_new_row_starts_from_the_average_and_then_goes_its_own_way():
    acceptance = Acceptance(4)
    for _ in range(50):
        for row in range(4):
            acceptance.observe(row, 4, 3)
    for row in range(4):
        acceptance.forget(row)
    ((_, average),) = acceptance.rates()
    for _ in range(100):
        acceptance.observe("new", 4, 1)
    ((_, learnt),) = acceptance.rates()
    assert learnt.expected([4])[0] < 1.3 < average.expected([4])[0]
    acceptance.forget("new")
    ((_, again),) = acceptance.rates()
    assert again.expected([4]) > learnt.expected([4])


def test_rows_of_two_kinds_are_told_apart():
    acceptance = Acceptance(4)
    for _ in range(50):
        for row in range(6):
            acceptance.observe(row, 4, 3 if row % 2 == 0 else 1)
    (num_poor, poor), (num_good, good) = acceptance.rates()
    assert (num_poor, num_good) == (3, 3)
    assert poor.expected([4])[0] < 1.3
    assert good.expected([4])[0] > 1.5


def test_rates_of_the_widest_windows_are_finite_when_nothing_holds():
    acceptance = Acceptance(256)
    for _ in range(300):
        acceptance.observe("row", 256, 1)
    ((_, rates),) = acceptance.rates()
    assert rates.expected([256]) == pytest.approx([1.0], abs=0.1)


def test_rows_that_come_and_go_between_decisions_are_counted_and_dropped():
    acceptance = Acceptance(4)
    for key in range(5000):
        acceptance.observe(key, 4, 2)
        if key >= 10:
            acceptance.forget(key - 10)
    assert len(acceptance._rows) + len(acceptance._finished) < 300
    (_, rates), _ = acceptance.rates()
    assert rates.fresh == pytest.approx(0.5, abs=0.05)


def test_costs_are_monotone_and_linear_between_batches():
    table = CostTable([1, 4], [1, 2], [[3.0, 2.0], [5.0, 10.0]])  # the first point was disturbed
    assert table.cost(1, 1) == 2.0
    assert table.cost(1, 2) == 2.0
    assert table.cost(2, 1) == pytest.approx(3.0)
    assert table.cost(3, 2) == pytest.approx(2.0 + 8.0 * 2 / 3)
    assert table.cost(6, 2) == pytest.approx(15.0)
    rng = np.random.default_rng(0)
    noisy = CostTable(BATCHES, WIDTHS, 1 + rng.random((len(BATCHES), len(WIDTHS))))
    grid = np.array([[noisy.cost(batch, n) for n in WIDTHS] for batch in range(1, 129)])
    assert (np.diff(grid, axis=0) >= 0).all()
    assert (np.diff(grid, axis=1) >= 0).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CostTable([2, 1], [1], [[1.0], [1.0]]), "batches must be strictly increasing"),
        (lambda: CostTable([1], [0, 1], [[1.0, 1.0]]), "widths must be strictly increasing"),
        (lambda: CostTable([1], [1, 2], [[1.0]]), "milliseconds: shape"),
        (lambda: CostTable([1], [1], [[0.0]]), "positive"),
        (lambda: CostTable([1], [1], [[float("nan")]]), "positive"),
        (lambda: TABLES["linear"].cost(0, 1), "batch must be >= 1, got 0"),
        (lambda: TABLES["linear"].cost(1, 3), "n=3 was not measured"),
        (lambda: AdaptiveWindow(TABLES["linear"], [2, 4]), "1 must be among them"),
        (lambda: AdaptiveWindow(TABLES["linear"], [1, 3]), r"\[3\] not in the table"),
        (lambda: FixedWindow(0), "n must be >= 1"),
        (lambda: Acceptance(4).observe("row", 4, 5), "accepted=5 of n=4"),
        (lambda: Acceptance(4).observe("row", 4, 0), "accepted=0 of n=4"),
        (lambda: Acceptance(4).observe("row", 8, 2), "n=8"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_ar_alone_is_a_choice():
    policy = AdaptiveWindow(TABLES["linear"], [1])
    for _ in range(100):
        assert policy.choose(["row"]) == 1
        policy.observe("row", 1, 1)
