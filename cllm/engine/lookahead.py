"""Lookahead decoding in the engine (Fu et al. 2024, arXiv 2402.02057; `cllm.decoding.lookahead` explains the method).

A step feeds the columns and the candidates of every row at their own positions, under one mask, the same for all rows.
Its shape is fixed: where a pool has too few candidates, padding fills up. Keys and values are stored behind the seed's
in the order of the inputs, so those of a confirmed candidate are moved to where its tokens belong; the next step writes
over the others. What a step feeds depends on the result of the one before, so steps do not overlap.

Shapes: B rows of a step, T inputs of both branches, P of them whose predictions are read, X entries of an input or
result, E hidden size, R = B * P, V vocabulary.
"""

from collections.abc import Sequence as Many

import torch

from cllm.decoding.branches import Branches, LookaheadState
from cllm.decoding.guess import Guesser
from cllm.decoding.records import DecodeRequest
from cllm.engine.attention import WindowMask
from cllm.engine.config import EngineConfig
from cllm.engine.mode import Outcome
from cllm.engine.runner import Move, Runner
from cllm.engine.sampler import Logprobs
from cllm.engine.sequence import Recorder, Sequence
from cllm.engine.state import Entry
from cllm.engine.step import Launched
from cllm.errors import InputError


class LookaheadMode:
    """Implements `Mode`. The host keeps columns and pools; a row that is preempted goes on with its own.

    Args:
        pad_id: the guess of kind "pad", and what fills up missing candidates.
    """

    name = "lookahead"
    overlaps = False

    def __init__(self, runner: Runner, config: EngineConfig, pad_id: int) -> None:
        assert config.lookahead is not None
        self._runner = runner
        self._guess = config.guess
        self._pad_id = pad_id
        self._pool_text = config.lookahead.pool_text
        self._branches = config.lookahead.branches
        self._step = LookaheadStep(runner, self._branches, pad_id)
        self._states: dict[int, LookaheadState] = {}

    def check(self, request: DecodeRequest) -> None:
        if request.sampling.penalises:
            raise InputError(
                "repetition_penalty, presence_penalty, frequency_penalty: lookahead decoding does not support them"
            )

    def recorder(self, request: DecodeRequest) -> Recorder | None:
        return None

    def add(self, row: Sequence) -> None:
        guesser = Guesser(self._guess, row.request.prompt_ids, self._pad_id, row.request.sampling.seed)
        self._states[row.key] = LookaheadState(self._branches, guesser, row.tokens, pool_text=self._pool_text)

    def forget(self, key: int) -> None:
        del self._states[key]

    def entry(self, row: Sequence) -> Entry:
        return Entry(row, [])

    def step(self, width: int) -> "LookaheadStep":
        return self._step

    def inputs(self, rows: Many[Sequence]) -> list[list[int]]:
        return [self._step.input(row.place, self._states[row.key]) for row in rows]

    def read(self, launched: Launched) -> list[Outcome]:
        outcomes, moves = [], []
        for place, row, picked in launched.results():
            state, predicted = self._states[row.key], dict(zip(self._branches.read, picked, strict=True))
            run, fed = state.confirmed(predicted)
            run = run[: row.max_length - len(row.tokens)]
            confirmed = fed[: len(run) - 1]
            if confirmed:
                seed = state.seed_position
                moves.append(Move(row, seed + confirmed.start, seed + 1, len(confirmed)))
            outcomes.append(Outcome(row, place, run, len(run), [0, *map(self._branches.read.index, confirmed)]))
            state.advance(run, predicted)
        if moves:
            self._runner.move(moves)
        return outcomes


class LookaheadStep:
    """Implements `Step`: inputs are slot, position of the seed and T tokens; results are P predictions."""

    def __init__(self, runner: Runner, branches: Branches, pad_id: int) -> None:
        device = runner.device
        self.width = branches.num_inputs
        self.idle_input = [runner.state.idle_slot, 0, *[pad_id] * self.width]
        self._runner = runner
        self._pad_id = pad_id
        self._offsets_T = branches.offsets_T.to(device)
        self._mask = WindowMask.of(branches.visible_TT.to(device))
        self._read_P = torch.tensor(branches.read, device=device)

    def input(self, slot: int, state: LookaheadState) -> list[int]:
        """Of a row."""
        tokens = state.inputs()
        return [slot, state.seed_position, *tokens, *[self._pad_id] * (self.width - len(tokens))]

    def predict(self, inputs_BX: torch.Tensor, num_blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
        slots_B, seeds_B, tokens_BT = inputs_BX[:, 0], inputs_BX[:, 1], inputs_BX[:, 2:]
        places = self._runner.state.places(slots_B, seeds_B, self.width, num_blocks)
        hidden_TE = self._runner.hidden_TE(
            tokens_BT, places, positions_BW=seeds_B[:, None] + self._offsets_T, mask=self._mask
        )
        hidden_BPE = hidden_TE.unflatten(0, tokens_BT.shape)[:, self._read_P]
        logits_RV = self._runner.model.logits_RV(hidden_BPE.flatten(0, 1))
        return tokens_BT[:, self._read_P], logits_RV.unflatten(0, hidden_BPE.shape[:2])

    def finish(
        self, inputs_BX: torch.Tensor, fed_BP: torch.Tensor, logits_BPV: torch.Tensor, *, greedy: bool
    ) -> tuple[torch.Tensor, Logprobs | None]:
        if greedy:
            return logits_BPV.argmax(-1), None
        slots_B, seeds_B, sampler = inputs_BX[:, 0], inputs_BX[:, 1], self._runner.sampler
        positions_BP = seeds_B[:, None] + self._offsets_T[self._read_P] + 1
        picked_BP = sampler.pick_BW(logits_BPV, fed_BP, positions_BP, slots_B)
        return picked_BP, sampler.logprobs(logits_BPV, picked_BP)
