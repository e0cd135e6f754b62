"""Where documents come from: reference answers for AR fine-tuning, trajectories for consistency distillation."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from cllm.decoding.config import GuessKind
from cllm.decoding.guess import Guesser
from cllm.decoding.trajectories import Trajectory
from cllm.recipe import LossConfig
from cllm.tasks.prompts import Prompt
from cllm.training.documents import Document, Span
from cllm.training.lazy import LazySequence

State = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WindowGuess:
    """How windows of `block_size` unknown tokens are guessed, in training as in decoding."""

    kind: GuessKind
    block_size: int
    pad_id: int

    def tokens(self, prompt_ids: State, start: int, seed: int) -> State:
        """Guesses for the response tokens from `start` on."""
        guesser = Guesser(self.kind, prompt_ids, self.pad_id, seed)
        return tuple(guesser.guess(len(prompt_ids) + start, self.block_size))


class DocumentSource(Protocol):
    """Yields the documents of one pass over the data: a pure function of the epoch, so that training can resume.

    The sequence may make a document whenever it is asked for one, which is once an epoch.
    """

    def documents(self, epoch: int) -> Sequence[Document]: ...


class ReferenceDocuments:
    """AR fine-tuning: prompts with their reference answers, the same in every epoch."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self._documents = [Document(prompt.prompt_ids, prompt.reference_ids) for prompt in prompts]

    def documents(self, epoch: int) -> Sequence[Document]:
        return self._documents


class ResponseDocuments:
    """Prompts with the teacher's responses, the same in every epoch."""

    def __init__(self, trajectories: Sequence[Trajectory]) -> None:
        self._trajectories = trajectories

    def documents(self, epoch: int) -> Sequence[Document]:
        return LazySequence(range(len(self._trajectories)), self._document)

    def _document(self, index: int) -> Document:
        row = self._trajectories[index]
        return Document(row.prompt_ids, row.response_ids)


class TrajectoryDocuments:
    """Consistency distillation: every epoch draws new states of each block. With `ar_labels: reference` each of them is
    followed by a document of its prompt's reference answer.

    Args:
        guess: makes the initial guesses of `states: guess`.
        references: reference answers (with end token) by prompt id, for `ar_labels: reference`.
    """

    def __init__(
        self,
        trajectories: Sequence[Trajectory],
        config: LossConfig,
        seed: int,
        guess: WindowGuess,
        references: dict[str, State] | None = None,
    ) -> None:
        if config.ar_labels == "reference" and references is None:
            raise ValueError("ar_labels: reference needs the reference answers")
        self._trajectories = trajectories
        self._config = config
        self._seed = seed
        self._guess = guess
        self._references = references or {}

    def documents(self, epoch: int) -> Sequence[Document]:
        per_row = 1 if self._config.ar_labels == "teacher" else 2

        def make(index: int) -> Document:
            row = self._trajectories[index // per_row]
            if index % per_row:
                return Document(row.prompt_ids, self._references[row.prompt_id])
            return Document(row.prompt_ids, row.response_ids, self._spans(row, epoch), learn_response=per_row == 1)

        return LazySequence(range(per_row * len(self._trajectories)), make)

    def _spans(self, row: Trajectory, epoch: int) -> tuple[Span, ...]:
        rng = random.Random(f"{self._seed}/{epoch}/{row.prompt_id}")
        if self._config.states == "guess":
            return draw_guessed_spans(row, self._config.states_per_block, self._guess, rng)
        return draw_spans(row, self._config, rng)


def draw_spans(row: Trajectory, config: LossConfig, rng: random.Random) -> tuple[Span, ...]:
    """The noisy spans of one response: `states_per_block` draws of a state for every block."""
    spans = []
    for _ in range(config.states_per_block):
        drawn = _draw_states(row, config, rng)
        width = config.schedule_window if config.context == "noisy" else 1
        for first in range(0, len(drawn), width):
            states, following = zip(*drawn[first : first + width], strict=True)
            start = first * len(states[0])
            span = make_span(row.response_ids, start, sum(states, ()), sum(following, ()), config.target == "local")
            if span is not None:
                spans.append(span)
    return tuple(spans)


def draw_guessed_spans(row: Trajectory, per_block: int, guess: WindowGuess, rng: random.Random) -> tuple[Span, ...]:
    """Windows of initial guesses that tile the response, `per_block` times, from its start or a random place on."""
    spans = []
    for _ in range(per_block):
        # Every response is decoded from its start, so half of the tilings begin there.
        first = rng.choice((0, rng.randrange(guess.block_size)))
        for start in range(first, len(row.response_ids) - 1, guess.block_size):
            noisy = guess.tokens(row.prompt_ids, start, rng.getrandbits(32))
            span = make_span(row.response_ids, start, noisy, (), local=False)
            if span is not None:
                spans.append(span)
    return tuple(spans)


def make_span(response: State, start: int, noisy: State, following: State, local: bool) -> Span | None:
    """The part of `noisy` (tokens for response positions `start` on) that teaches something; None if there is none.

    Tokens before the first divergence see the same context as the clean ones, so that their loss is zero: the clean
    ones stand in for them. Behind the last token that has a successor there is nothing to predict.
    """
    end = min(start + len(noisy), len(response) - 1)
    first = start
    while first < end and noisy[first - start] == response[first]:
        first += 1
    if first >= end:
        return None
    target = None
    if local and following[first - start : end - start] != response[first:end]:
        target = Span(first, following[first - start : end - start])
    return Span(first, noisy[first - start : end - start], target)


def _draw_states(row: Trajectory, config: LossConfig, rng: random.Random) -> list[tuple[State, State]]:
    """For each block a drawn state, and the state that follows it in the trajectory."""
    phase = rng.randrange(config.schedule_window)
    drawn = []
    for index, block in enumerate(row.blocks):
        if config.schedule == "progressive":
            share = ((index + phase) % config.schedule_window) / config.schedule_window
            chosen = _closest_to_noise(block.states, share)
        else:
            chosen = rng.randrange(max(1, len(block.states) - 1))
        state, following = block.states[chosen], block.states[min(chosen + 1, len(block.states) - 1)]
        copies = row.augmented[index] if row.augmented else ()
        if copies and rng.random() < 0.5:
            # a corrected copy is a guess of its own; what follows it in a trajectory is only known in the limit
            state, following = rng.choice(copies), block.fixed_point
        drawn.append((state, following))
    return drawn


def _closest_to_noise(states: Sequence[State], share: float) -> int:
    """Index of the state whose share of tokens that differ from the fixed point is closest to `share`."""
    fixed = states[-1]
    noise = [sum(a != b for a, b in zip(state, fixed, strict=True)) / len(fixed) for state in states]
    return min(range(len(states)), key=lambda i: abs(noise[i] - share))
