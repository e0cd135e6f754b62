"""One request in the engine: its tokens, its place, and what a step's predictions change. No tensors."""

from collections.abc import Sequence as Tokens

from cllm.decoding.guess import Guesser
from cllm.decoding.records import BlockTrajectory, DecodeRequest, DecodeResult, FinishReason
from cllm.engine.detokenize import StreamDecoder


class Recorder:
    """Writes down the Jacobi trajectory of each block (refill block; paper section 3.1)."""

    def __init__(self, guesser: Guesser, block_size: int, start: int) -> None:
        self.guesser = guesser
        self.block_size = block_size
        self.blocks: list[BlockTrajectory] = []
        self._start = self._known = start
        self._states: list[tuple[int, ...]] = []
        self._open(start)

    def note(self, predictions: Tokens[int], num_known: int, *, finished: bool) -> None:
        """One forward pass: predictions for the block's unknown tokens; `num_known` of the sequence's are known now."""
        unknown = self._start + self.block_size - self._known
        committed = self._states[-1][: self.block_size - unknown]
        self._states.append(committed + tuple(predictions[:unknown]))
        self._known = num_known
        converged = num_known - self._start == self.block_size
        if converged or finished:
            self.blocks.append(BlockTrajectory(tuple(self._states)))
        if converged and not finished:
            self._open(num_known)

    def carried(self) -> list[int]:
        """The guesses for the block's unknown tokens, as the last forward pass left them."""
        return list(self._states[-1][self._known - self._start :])

    def _open(self, start: int) -> None:
        self._start = self._known = start
        self._states = [tuple(self.guesser.guess(start, self.block_size))]


class Sequence:
    """State of one request on the host. The device may be a step ahead.

    Args:
        recorder: keeps the trajectory, if it is asked for.
        text: looks for the request's stop strings, if it has any.

    Attributes:
        tokens: prompt and committed tokens.
        slot: its place in the batch, or None while it waits.
        blocks: cache blocks it owns, in the order of its tokens.
        digests: of the blocks that its tokens fill, as far as `BlockPool.digests` was asked for them.
        num_stored: tokens whose keys and values are in the cache or will be when the launched work is done.
        num_in_flight: upper bound on tokens that launched steps may commit and the host has not read yet.
        admissions: how often it got a slot; a step launched before the last time does not count any more.
    """

    def __init__(
        self,
        key: int,
        request: DecodeRequest,
        eos_ids: frozenset[int],
        recorder: Recorder | None = None,
        text: StreamDecoder | None = None,
    ) -> None:
        self.key = key
        self.request = request
        self.recorder = recorder
        self.text = text
        self.num_prompt = len(request.prompt_ids)
        self.max_length = self.num_prompt + request.max_new_tokens
        self.tokens = list(request.prompt_ids)
        self.slot: int | None = None
        self.blocks: list[int] = []
        self.digests: list[bytes] = []
        self.num_stored = 0
        self.num_in_flight = 0
        self.admissions = 0
        self.accepted: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._stop_ids = request.sampling.end_ids(eos_ids)

    @property
    def place(self) -> int:
        """The slot of a running sequence."""
        assert self.slot is not None, f"sequence {self.key} is not running"
        return self.slot

    @property
    def is_prefilled(self) -> bool:
        """All but the last known token are stored, so that a window can start from it."""
        return self.num_stored >= len(self.tokens) - 1

    def advance(self, predictions: list[int], count: int) -> list[int]:
        """Commit the first `count` predictions, up to the one that ends the response; returns what was committed."""
        tokens = predictions[:count]
        if not self._stop_ids.isdisjoint(tokens):
            end = next(i for i, token in enumerate(tokens) if token in self._stop_ids)
            tokens = tokens[: end + 1]
            self.finish_reason = "stop"
        if self.text is not None:
            self.text.push(tokens)
            if self.text.stop_index is not None:
                tokens = tokens[: self.text.stop_index + 1]
                self.finish_reason = "stop"
        self.tokens += tokens
        self.num_stored = len(self.tokens) - 1
        self.accepted.append(len(tokens))
        if self.finish_reason is None and len(self.tokens) >= self.max_length:
            self.finish_reason = "length"
        if self.recorder is not None:
            self.recorder.note(predictions, len(self.tokens), finished=self.finish_reason is not None)
        return tokens

    def result(self) -> DecodeResult:
        assert self.finish_reason is not None
        blocks = tuple(self.recorder.blocks) if self.recorder else ()
        return DecodeResult(tuple(self.tokens[self.num_prompt :]), self.finish_reason, tuple(self.accepted), blocks)
