"""One row of a decoding batch: its tokens, its window of guesses, and what a forward pass changes. No tensors."""

from cllm.decoding.guess import Guesser
from cllm.decoding.records import (
    BlockTrajectory,
    Commit,
    DecodeRequest,
    DecodeResult,
    FinishReason,
    Refill,
)


class Row:
    """State of one request between forward passes.

    The window covers `window` unknown positions: the row feeds the seed (its last committed token) and `window - 1`
    guesses, and gets `window` predictions back.
    """

    def __init__(
        self,
        index: int,
        request: DecodeRequest,
        guesser: Guesser,
        block_size: int,
        refill: Refill,
        eos_ids: frozenset[int],
        record: bool,
    ) -> None:
        self.index = index
        self.request = request
        self.guesser = guesser
        self.block_size = block_size
        self.refill = refill
        self.eos_ids = eos_ids
        self.finish_reason: FinishReason | None = None
        self.max_length = len(request.prompt_ids) + request.max_new_tokens
        self._record = record
        self._tokens = list(request.prompt_ids)
        self._accepted: list[int] = []
        self._trajectories: list[BlockTrajectory] = []
        self._open_block()

    @property
    def seed_position(self) -> int:
        return len(self._tokens) - 1

    @property
    def window(self) -> int:
        return len(self._guesses) + 1

    def inputs(self, window: int, pad_id: int, *, with_prompt: bool) -> list[int]:
        """Tokens of the next forward: [seed, guesses], padded to `window`, after the rest of the prompt if asked."""
        head = self._tokens if with_prompt else self._tokens[-1:]
        return head + self._guesses + [pad_id] * (window - self.window)

    def advance(self, predictions: list[int], agreed: int) -> Commit:
        """Commit the predictions that hold and make the rest the next guesses.

        Args:
            predictions: at least `window` tokens; those behind the window are ignored.
            agreed: how many predictions the guesses confirm, 1 at least; padding may make it exceed the window.
        """
        window = self.window
        count = min(agreed, window, self.max_length - len(self._tokens))
        tokens = predictions[:count]
        for i, token in enumerate(tokens):
            if token in self.eos_ids:
                tokens = tokens[: i + 1]
                self.finish_reason = "stop"
                break
        self._tokens += tokens
        self._accepted.append(len(tokens))
        if self.finish_reason is None and len(self._tokens) == self.max_length:
            self.finish_reason = "length"
        self._note_state(predictions[:window])
        if self.finish_reason is None:
            self._refill(predictions[count:window])
        return Commit(self.index, tuple(tokens), self.finish_reason)

    def result(self) -> DecodeResult:
        assert self.finish_reason is not None
        new_tokens = tuple(self._tokens[len(self.request.prompt_ids) :])
        return DecodeResult(new_tokens, self.finish_reason, tuple(self._accepted), tuple(self._trajectories))

    def _open_block(self) -> None:
        """Start a window of `block_size` unknown tokens from guesses alone."""
        guesses = self.guesser.guess(len(self._tokens), self.block_size)
        self._block_start = len(self._tokens)
        self._states = [tuple(guesses)] if self._record else []
        self._guesses = guesses[:-1]  # the last token of a state is predicted, never fed

    def _refill(self, carried: list[int]) -> None:
        if self.refill == "sliding":
            missing = self.block_size - 1 - len(carried)
            start = len(self._tokens) + len(carried)
            self._guesses = carried + self.guesser.guess(start, missing)
        elif carried:
            self._guesses = carried[:-1]
        else:
            self._open_block()

    def _note_state(self, predictions: list[int]) -> None:
        """Append the block's state after this forward: its committed tokens, then the predictions for the others."""
        if not self._record:
            return
        offset = len(self._states[0]) - len(predictions)
        committed = self._states[-1][:offset]
        self._states.append(committed + tuple(predictions))
        converged = len(self._tokens) - self._block_start == self.block_size
        if converged or self.finish_reason is not None:
            self._trajectories.append(BlockTrajectory(tuple(self._states)))
