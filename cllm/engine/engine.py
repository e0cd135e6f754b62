"""The engine: requests in, committed tokens out, one step at a time.

Shapes: none here; tensors live in `cllm.engine.runner` and below.
"""

import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from cllm.decoding.guess import Guesser
from cllm.decoding.records import Commit, DecodeRequest, DecodeResult, TokenLogprob
from cllm.engine.blocks import BlockPool
from cllm.engine.config import EngineConfig
from cllm.engine.detokenize import StreamDecoder
from cllm.engine.model import DecoderModel
from cllm.engine.ngram import NgramPool
from cllm.engine.policy import FixedWindow, WindowPolicy
from cllm.engine.runner import Launched, Runner
from cllm.engine.sampler import Logprobs, Sampler
from cllm.engine.scheduler import Scheduler
from cllm.engine.sequence import Recorder, Sequence
from cllm.engine.state import Entry
from cllm.errors import InputError


@dataclass(frozen=True, slots=True)
class StepStats:
    """What one step did.

    Attributes:
        rows: decoded.
        window: of these rows; where the engine does not tell, the widest it may have been.
        accepted: tokens committed to them.
        milliseconds: since the step before.
        unfinished: requests in the engine after it.
        waiting: of these, those without a row; None: the engine does not tell.
        cache_used: share of the cache that holds running requests after it; None: the engine does not tell.
    """

    rows: int
    window: int
    accepted: int
    milliseconds: float
    unfinished: int
    waiting: int | None
    cache_used: float | None


class Engine:
    """Continuous batching of AR and Jacobi decoding over one model.

    Args:
        model: on its device; `cllm.engine.weights` loads one.
        eos_ids: tokens that end a response (they are part of it).
        pad_id: the guess of kind "pad".
        num_blocks: cache blocks; None: room for `max_rows` rows of `max_tokens`.
        policy: chooses each step's window; None: always `config.window`.
        tokenizer: finds stop strings; without one, requests must not have any.

    Not thread-safe: one thread calls everything (`cllm.engine.async_engine` has one of its own).
    """

    def __init__(
        self,
        model: DecoderModel,
        config: EngineConfig,
        *,
        eos_ids: Many[int],
        pad_id: int,
        num_blocks: int | None = None,
        policy: WindowPolicy | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        _check(config, model)
        self.model = model
        self.config = config
        self.eos_ids = frozenset(eos_ids)
        self.pad_id = pad_id
        self.tokenizer = tokenizer
        pool_blocks = num_blocks or 1 + config.max_rows * -(-config.max_tokens // config.block_tokens)
        self.scheduler = Scheduler(
            BlockPool(pool_blocks, config.block_tokens, reuse_prefixes=config.reuse_prefixes),
            max_rows=config.max_rows,
            max_tokens=config.max_tokens,
            prefill_tokens=config.prefill_tokens,
        )
        self.sampler = Sampler(
            num_slots=config.max_rows + 1,
            vocab_size=model.shape.vocab_size,
            eos_ids=sorted(self.eos_ids),
            device=model.device,
        )
        self.runner = Runner(model, self.sampler, config, num_blocks=pool_blocks, fill_id=pad_id)
        self.policy = policy or FixedWindow(config.window)
        self.overlap = model.device.type == "cuda" if config.overlap is None else config.overlap
        self.last_step: StepStats | None = None
        self._sequences: dict[int, Sequence] = {}
        self._pools: dict[int, NgramPool] = {}
        self._next_key = 0
        self._in_flight: Launched | None = None
        self._read_at = time.perf_counter()

    @property
    def num_unfinished(self) -> int:
        return len(self._sequences)

    def add(self, request: DecodeRequest) -> int:
        """Queue a request; the key that names it in `step` and `abort`.

        Raises:
            InputError: it is longer than the context or the cache, a token is not in the vocabulary, or it has stop
                strings and the engine no tokenizer.
        """
        check_vocabulary(request, self.model.shape.vocab_size)
        key = self._next_key
        recorder = self._recorder(request) if self.config.record else None
        sequence = Sequence(key, request, self.eos_ids, recorder, self._stop_finder(request))
        self.scheduler.add(sequence)
        self._next_key += 1
        self._sequences[key] = sequence
        if self.config.ngram:
            self._pools[key] = NgramPool(self.config.ngram)
            self._pools[key].add(request.prompt_ids)
        return key

    def abort(self, key: int) -> None:
        """Forget a request; nothing if it is finished."""
        sequence = self._sequences.get(key)
        if sequence is not None:
            self._drop(sequence)

    def capture(self) -> None:
        """Capture the graphs of all batches and windows that may come, so that no request waits for one."""
        self.runner.capture(self.policy.widths)

    def next_window(self) -> int:
        """The window that the policy wants for the next step."""
        return self.policy.choose([row.key for row in self.scheduler.running])

    def step(self, window: int | None = None) -> list[Commit]:
        """Launch the next step, and return what the latest finished one committed, in the order of its rows.

        `last_step` then says what that step did; it is None if none was finished.

        Args:
            window: of the step; None: the policy's choice.
        """
        self.last_step = None
        launched = self._launch(self.next_window() if window is None else window)
        if self.overlap:
            launched, self._in_flight = self._in_flight, launched
        return [] if launched is None else self._read(launched)

    def stream(self, requests: Many[DecodeRequest]) -> Iterator[list[Commit]]:
        """Decode requests, yielding after every step what it committed; rows are numbered as in `requests`."""
        row_of = {self.add(request): row for row, request in enumerate(requests)}
        while not row_of.keys().isdisjoint(self._sequences):
            commits = [commit for commit in self.step() if commit.row in row_of]
            if commits:
                yield [replace(commit, row=row_of[commit.row]) for commit in commits]

    def generate(self, requests: Many[DecodeRequest]) -> list[DecodeResult]:
        """Decode all requests; results in their order."""
        return run_to_end(self, [self.add(request) for request in requests], self.step)

    def check(self) -> None:
        """Raise what ended the engine without a step telling: nothing, for it depends on no other process."""

    def close(self) -> None:
        """End the processes that the engine depends on: none."""

    def sequence(self, key: int) -> Sequence:
        """An unfinished request."""
        return self._sequences[key]

    def _launch(self, window: int) -> Launched | None:
        plan = self.scheduler.plan(window)
        if plan.grown:
            self.runner.state.grow(plan.grown)
        if plan.admitted:
            self._admit(plan.admitted)
        if plan.chunks:
            self.runner.store(plan.chunks)
        if not plan.rows:
            return None
        launched = self.runner.decode(plan.rows, window)
        for row in plan.rows:
            row.num_in_flight += window
        return launched

    def _admit(self, sequences: Many[Sequence]) -> None:
        for sequence in sequences:
            output_ids = sequence.tokens[sequence.num_prompt :]
            self.sampler.set(sequence.place, sequence.request.sampling, sequence.request.prompt_ids, output_ids)
        self.runner.state.admit([self._entry(sequence) for sequence in sequences])

    def _read(self, launched: Launched) -> list[Commit]:
        """Give the results to the sequences that still wait for them."""
        commits, offers = [], []
        results = zip(launched.rows, launched.read(), strict=True)
        for place, ((row, admission), (count, *predictions)) in enumerate(results):
            if row.slot is None or row.admissions != admission:
                continue  # finished, aborted or preempted since
            row.num_in_flight -= launched.width
            tokens = row.advance(predictions, count)
            logprobs = _logprobs(launched.logprobs, place, row, len(tokens))
            commits.append(Commit(row.key, tuple(tokens), row.finish_reason, logprobs, tuple(predictions[count:])))
            if row.finish_reason is not None:
                self._drop(row)
                continue
            self.policy.observe(row.key, launched.width, count)
            if self.config.ngram:
                offers += self._offers(row, predictions[count:])
        if offers:
            self.runner.state.offer(offers)
        self._note_step(launched, commits)
        return commits

    def _drop(self, sequence: Sequence) -> None:
        if sequence.slot is not None:
            self.sampler.clear(sequence.slot)
        self.scheduler.remove(sequence)
        self.policy.forget(sequence.key)
        del self._sequences[sequence.key]
        self._pools.pop(sequence.key, None)

    def _offers(self, row: Sequence, rejected: list[int]) -> list[tuple[int, int, int]]:
        """Guesses that the row's n-grams propose for the positions after its last token."""
        pool = self._pools[row.key]
        pool.add(row.tokens[-row.accepted[-1] - self.config.ngram :])
        pool.add(rejected)
        proposed = pool.continue_from(row.tokens, self.config.window - 1)
        return [(row.place, len(row.tokens) + i, token) for i, token in enumerate(proposed)]

    def _stop_finder(self, request: DecodeRequest) -> StreamDecoder | None:
        if not request.sampling.stop:
            return None
        if self.tokenizer is None:
            raise InputError("stop: the engine has no tokenizer to find stop strings with")
        return StreamDecoder(self.tokenizer, request.sampling.stop)

    def _guesser(self, request: DecodeRequest) -> Guesser:
        return Guesser(self.config.guess, request.prompt_ids, self.pad_id, request.sampling.seed)

    def _recorder(self, request: DecodeRequest) -> Recorder:
        return Recorder(self._guesser(request), self.config.window, len(request.prompt_ids))

    def _entry(self, sequence: Sequence) -> Entry:
        """What the device is to know of a sequence that gets a slot, for the first time or again."""
        known, n = len(sequence.tokens), self.config.window
        carried = sequence.recorder.carried() if sequence.recorder else []
        start = known + len(carried)
        fresh = self._guesser(sequence.request).guess(start, sequence.max_length + n - start)
        if self.config.refill == "sliding":
            return Entry(sequence, fresh)
        offset = (known - sequence.num_prompt) % n
        return Entry(sequence, carried + fresh, block_size=n, block_end=known - offset + n)

    def _note_step(self, launched: Launched, commits: Many[Commit]) -> None:
        now = time.perf_counter()
        accepted = sum(len(commit.token_ids) for commit in commits)
        pool = self.scheduler.pool
        self.last_step = StepStats(
            rows=len(launched.rows),
            window=launched.width,
            accepted=accepted,
            milliseconds=1000 * (now - self._read_at),
            unfinished=self.num_unfinished,
            waiting=len(self.scheduler.waiting),
            cache_used=1 - pool.num_available / (pool.num_blocks - 1),
        )
        self._read_at = now


def check_vocabulary(request: DecodeRequest, size: int) -> None:
    """Raise InputError for a token of the request that a model with `size` embeddings does not know."""
    for token in (*request.prompt_ids, *request.sampling.stop_token_ids):
        if not 0 <= token < size:
            raise InputError(f"token {token} is not in the vocabulary of {size}")


def run_to_end(engine: Engine, keys: Many[int], step: Callable[[], object]) -> list[DecodeResult]:
    """Step until these requests are finished; their results."""
    sequences = [engine.sequence(key) for key in keys]
    while any(sequence.finish_reason is None for sequence in sequences):
        step()
    return [sequence.result() for sequence in sequences]


def _logprobs(found: Logprobs | None, place: int, row: Sequence, count: int) -> tuple[TokenLogprob, ...] | None:
    """Those of the first `count` predictions of a step's row, if its request asked for them."""
    asked = row.request.sampling.logprobs
    if asked is None or found is None:
        return None
    columns = (found.chosen_BW, found.top_ids_BWK, found.top_BWK)
    chosen, top_ids, top = (column[place, :count].tolist() for column in columns)
    return tuple(
        TokenLogprob(logprob, tuple(zip(ids[:asked], values[:asked], strict=True)))
        for logprob, ids, values in zip(chosen, top_ids, top, strict=True)
    )


def _check(config: EngineConfig, model: DecoderModel) -> None:
    if config.record and (config.refill != "block" or config.policy != "fixed"):
        raise InputError("record: trajectories need refill 'block' and policy 'fixed'")
    if config.max_tokens > model.shape.max_positions:
        raise InputError(f"max_tokens={config.max_tokens} exceeds the model's {model.shape.max_positions} positions")
