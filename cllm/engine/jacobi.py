"""Jacobi decoding in the engine: a step feeds the seed and n - 1 guesses. AR decoding is n = 1.

Shapes: B rows of a step, W window (n), X entries of an input or result, V vocabulary.
"""

from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch

from cllm.decoding.guess import Guesser
from cllm.decoding.records import DecodeRequest, SamplingParams
from cllm.engine.config import EngineConfig
from cllm.engine.costs import CostTable
from cllm.engine.mode import Outcome
from cllm.engine.ngram import GuessRace, NgramPool
from cllm.engine.runner import Runner
from cllm.engine.sampler import Logprobs
from cllm.engine.sequence import Recorder, Sequence
from cllm.engine.state import Entry
from cllm.engine.step import Launched


class JacobiMode:
    """Implements `Mode`. The device keeps the guesses (`DeviceState`), so a step needs nothing from the host.

    Args:
        pad_id: the guess of kind "pad".
    """

    overlaps = True

    def __init__(self, runner: Runner, config: EngineConfig, pad_id: int) -> None:
        self._runner = runner
        self._config = config
        self._pad_id = pad_id
        self._pools: dict[int, NgramPool] = {}
        self._race = GuessRace()
        self._rivals: dict[int, tuple[int, int]] = {}  # of a row's next token: the carried guess and the n-grams'

    @property
    def name(self) -> str:
        return "ar" if self._config.window == 1 else f"jacobi-{self._config.refill}"

    def check(self, request: DecodeRequest) -> None:
        """Nothing is refused."""

    def recorder(self, request: DecodeRequest) -> Recorder | None:
        if not self._config.record:
            return None
        return Recorder(self._guesser(request), self._config.window, len(request.prompt_ids))

    def add(self, row: Sequence) -> None:
        if self._config.ngram:
            self._pools[row.key] = NgramPool(self._config.ngram)
            self._pools[row.key].add(row.tokens)

    def forget(self, key: int) -> None:
        self._pools.pop(key, None)
        self._rivals.pop(key, None)

    def entry(self, row: Sequence) -> Entry:
        known, n = len(row.tokens), self._config.window
        carried = row.recorder.carried() if row.recorder else []
        start = known + len(carried)
        fresh = self._guesser(row.request).guess(start, row.max_length + n - start)
        if self._config.refill == "sliding":
            return Entry(row, fresh)
        offset = (known - row.num_prompt) % n
        return Entry(row, carried + fresh, block_size=n, block_end=known - offset + n)

    def step(self, width: int) -> "JacobiStep":
        return JacobiStep(self._runner, width)

    def inputs(self, rows: Many[Sequence]) -> list[list[int]]:
        return [[row.place] for row in rows]

    def read(self, launched: Launched) -> list[Outcome]:
        outcomes, offers = [], []
        for place, row, (count, *predictions) in launched.results():
            outcomes.append(Outcome(row, place, predictions, count, range(count)))
            if self._config.ngram:
                offers += self._offers(row, predictions[:count], predictions[count:])
        if offers:
            self._runner.state.offer(offers)
        return outcomes

    def _offers(self, row: Sequence, accepted: list[int], rejected: list[int]) -> list[tuple[int, int, int]]:
        """What the row's n-grams propose for the positions behind the accepted tokens, if they are the better guesses.

        They never fill up behind carried predictions: a consistency model was trained on the initial guess there.
        """
        pool, latest = self._pools[row.key], row.tokens[-self._config.ngram :] + accepted
        rivals = self._rivals.pop(row.key, None)
        if rivals is not None and accepted:
            self._race.note(*rivals, accepted[0])
        pool.add(latest)
        pool.add(rejected)
        proposed = pool.continue_from(latest, self._config.window - 1)
        if rejected and proposed:
            self._rivals[row.key] = rejected[0], proposed[0]
        if not self._race.ngrams_lead:
            return []
        start = len(row.tokens) + len(accepted)
        return [(row.place, start + i, token) for i, token in enumerate(proposed)]

    def _guesser(self, request: DecodeRequest) -> Guesser:
        return Guesser(self._config.guess, request.prompt_ids, self._pad_id, request.sampling.seed)


def time_steps(
    runner: Runner, batches: Many[int], widths: Many[int], context: int, sampling: SamplingParams
) -> CostTable:
    """Milliseconds of steps of rows that have `context` tokens each, before any request: the rows' slots are used.

    No two rows have a block in common, as far as the cache has blocks enough: else keys would come from the L2 cache.
    """
    slots = list(range(max(batches)))
    for slot in slots:
        runner.sampler.set(slot, sampling, [0])
    runner.state.rehearse(len(slots), context, max(widths), runner.num_blocks)

    def milliseconds(batch: int, width: int) -> float:
        rows = slots[:batch]
        greedy = runner.sampler.is_greedy(rows)
        step, end = JacobiStep(runner, width), context + width
        return runner.time(step, [[slot] for slot in rows], end, greedy=greedy, repeats=5 if greedy else 3)

    # The largest come first: the memory of their graphs is enough for the others.
    times = {(batch, width): milliseconds(batch, width) for batch in batches[::-1] for width in widths[::-1]}
    for slot in slots:
        runner.sampler.clear(slot)
    runner.state.reset()
    return CostTable(batches, widths, [[times[batch, width] for width in widths] for batch in batches])


@dataclass(frozen=True)
class JacobiStep:
    """Implements `Step`: inputs are slots, results each row's number of committed tokens, then its W predictions."""

    runner: Runner
    width: int

    @property
    def idle_input(self) -> list[int]:
        return [self.runner.state.idle_slot]

    def predict(self, inputs_BX: torch.Tensor, num_blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
        slots_B = inputs_BX[:, 0]
        window_BW, places = self.runner.state.window(slots_B, self.width, num_blocks)
        hidden_TE = self.runner.hidden_TE(window_BW, places)
        return window_BW, self.runner.model.logits_RV(hidden_TE).unflatten(0, window_BW.shape)

    def finish(
        self, inputs_BX: torch.Tensor, fed_BP: torch.Tensor, logits_BPV: torch.Tensor, *, greedy: bool
    ) -> tuple[torch.Tensor, Logprobs | None]:
        slots_B, state, sampler = inputs_BX[:, 0], self.runner.state, self.runner.sampler
        if greedy:
            predictions_BW = logits_BPV.argmax(-1)
        else:
            positions_BW = state.positions(state.length_R[slots_B], self.width)
            predictions_BW = sampler.pick_BW(logits_BPV, fed_BP, positions_BW, slots_B)
        result_BX = state.accept(slots_B, fed_BP, predictions_BW)
        if greedy:
            return result_BX, None
        sampler.commit(slots_B, predictions_BW, result_BX[:, 0])
        return result_BX, sampler.logprobs(logits_BPV, predictions_BW)
