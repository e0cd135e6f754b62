"""The engine: requests in, committed tokens out, one step at a time.

Shapes: none here; tensors live in `cllm.engine.runner` and below.
"""

import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from cllm.decoding.records import Commit, DecodeRequest, DecodeResult, TokenLogprob
from cllm.decoding.stats import AcceptanceCounter, BackendStats, StepStats, device_memory_bytes, package_version
from cllm.engine.blocks import BlockPool
from cllm.engine.config import EngineConfig
from cllm.engine.detokenize import StreamDecoder
from cllm.engine.jacobi import JacobiMode
from cllm.engine.lookahead import LookaheadMode
from cllm.engine.mode import Mode, Outcome
from cllm.engine.model import DecoderModel
from cllm.engine.policy import FixedWindow, WindowPolicy
from cllm.engine.runner import Runner
from cllm.engine.sampler import Logprobs, Sampler
from cllm.engine.scheduler import Scheduler
from cllm.engine.sequence import Sequence
from cllm.engine.step import Launched
from cllm.errors import InputError


class Engine:
    """Continuous batching of AR, Jacobi and lookahead decoding over one model.

    Args:
        model: on its device; `cllm.engine.weights` loads one.
        eos_ids: tokens that end a response (they are part of it).
        pad_id: the guess of kind "pad".
        num_blocks: cache blocks; None: room for `max_rows` rows of `max_tokens`.
        policy: chooses each step's window (lookahead has none to choose); None: always the widest.
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
        pool_blocks = num_blocks or 1 + config.max_rows * config.row_blocks
        self.scheduler = Scheduler(
            BlockPool(pool_blocks, config.block_tokens, reuse_prefixes=config.reuse_prefixes),
            max_rows=config.max_rows,
            max_tokens=config.max_tokens,
            prefill_tokens=config.prefill_tokens,
            overhang=config.overhang,
        )
        self.sampler = Sampler(
            num_slots=config.max_rows + 1,
            vocab_size=model.shape.vocab_size,
            eos_ids=sorted(self.eos_ids),
            device=model.device,
        )
        self.runner = Runner(model, self.sampler, config, num_blocks=pool_blocks, fill_id=pad_id)
        self.mode: Mode = (JacobiMode if config.lookahead is None else LookaheadMode)(self.runner, config, pad_id)
        self.policy = policy or FixedWindow(config.width)
        wanted = model.device.type == "cuda" if config.overlap is None else config.overlap
        self.overlap = wanted and self.mode.overlaps
        self.last_step: StepStats | None = None
        self._acceptance = AcceptanceCounter(config.depth)
        self._sequences: dict[int, Sequence] = {}
        self._next_key = 0
        self._in_flight: Launched | None = None
        self._read_at = time.perf_counter()

    @property
    def num_unfinished(self) -> int:
        return len(self._sequences)

    def add(self, request: DecodeRequest) -> int:
        """Queue a request; the key that names it in `step` and `abort`.

        Raises:
            InputError: it is longer than the context or the cache, a token is not in the vocabulary, it has stop
                strings and the engine no tokenizer, or penalties, which lookahead decoding does not support.
        """
        check_vocabulary(request, self.model.shape.vocab_size)
        self.mode.check(request)
        key = self._next_key
        sequence = Sequence(key, request, self.eos_ids, self.mode.recorder(request), self._stop_finder(request))
        self.scheduler.add(sequence)
        self.mode.add(sequence)
        self._next_key += 1
        self._sequences[key] = sequence
        return key

    def abort(self, key: int) -> None:
        """Forget a request; nothing if it is finished."""
        sequence = self._sequences.get(key)
        if sequence is not None:
            self._drop(sequence)

    def capture(self) -> None:
        """Capture the graphs of all batches, windows and kinds of draw that may come, so that no request waits for one.

        Nothing without CUDA graphs, and for those that are there. `cllm.engine.load` does it (`EngineConfig.capture`).
        """
        self.runner.capture([self.mode.step(width) for width in self.policy.widths])

    def next_window(self) -> int:
        """The window that the policy wants for the next step."""
        running = self.scheduler.running
        return self.policy.choose([row.key for row in running], self.sampler.work(row.place for row in running))

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
        """Decode requests, yielding after every step what it committed; rows are numbered as in `requests`. Closing the
        iterator aborts them.
        """
        with added(self, requests) as keys:
            row_of = {key: row for row, key in enumerate(keys)}
            while not row_of.keys().isdisjoint(self._sequences):
                commits = [commit for commit in self.step() if commit.row in row_of]
                if commits:
                    yield [replace(commit, row=row_of[commit.row]) for commit in commits]

    def generate(self, requests: Many[DecodeRequest]) -> list[DecodeResult]:
        """Decode all requests; results in their order. If one is refused, none is left behind."""
        with added(self, requests) as keys:
            return run_to_end(self, keys, self.step)

    def stats(self) -> BackendStats:
        """What it is, and how guesses fared since it started."""
        depth = self.config.depth
        return BackendStats(
            method=self.mode.name,
            package="cllm",
            version=package_version("cllm"),
            runner=None,
            scheduling="async" if self.overlap else "sync",
            guesses=depth - 1,
            memory_bytes=device_memory_bytes(self.model.device),
            acceptance=self._acceptance.read() if depth > 1 else None,
        )

    def check(self) -> None:
        """Raise what ended the engine without a step telling: nothing, for it depends on no other process."""

    def close(self) -> None:
        """End the processes that the engine depends on: none."""

    def sequence(self, key: int) -> Sequence:
        """An unfinished request."""
        return self._sequences[key]

    def _launch(self, window: int) -> Launched | None:
        step = self.mode.step(window)
        plan = self.scheduler.plan(step.width)
        for slot in plan.preempted:
            self.sampler.clear(slot)
        if plan.grown:
            self.runner.state.grow(plan.grown)
        if plan.admitted:
            self._admit(plan.admitted)
        if plan.chunks:
            self.runner.store(plan.chunks)
        if not plan.rows:
            return None
        launched = self.runner.launch(step, plan.rows, self.mode.inputs(plan.rows), alone=plan.only_decodes)
        for row in plan.rows:
            row.num_in_flight += step.width
        return launched

    def _admit(self, sequences: Many[Sequence]) -> None:
        for sequence in sequences:
            start = sequence.num_prompt - sequence.request.num_given  # of the response
            prompt_ids, output_ids = sequence.tokens[:start], sequence.tokens[start:]
            self.sampler.set(sequence.place, sequence.request.sampling, prompt_ids, output_ids)
        self.runner.state.admit([self.mode.entry(sequence) for sequence in sequences])

    def _read(self, launched: Launched) -> list[Commit]:
        """Give the results to the sequences that still wait for them."""
        commits = []
        for outcome in self.mode.read(launched):
            row, count = outcome.row, outcome.count
            row.num_in_flight -= launched.width
            tokens = row.advance(outcome.predictions, count)
            logprobs = _logprobs(launched.logprobs, outcome, len(tokens))
            guesses = tuple(outcome.predictions[count:])
            commits.append(Commit(row.key, tuple(tokens), row.finish_reason, logprobs, guesses))
            if row.finish_reason is not None:
                self._drop(row)
            else:
                self.policy.observe(row.key, launched.width, count)
        self._note_step(launched, commits)
        return commits

    def _drop(self, sequence: Sequence) -> None:
        if sequence.slot is not None:
            self.sampler.clear(sequence.slot)
        self.scheduler.remove(sequence)
        self.policy.forget(sequence.key)
        self.mode.forget(sequence.key)
        del self._sequences[sequence.key]

    def _stop_finder(self, request: DecodeRequest) -> StreamDecoder | None:
        if not request.sampling.stop:
            return None
        if self.tokenizer is None:
            raise InputError("stop: the engine has no tokenizer to find stop strings with")
        min_tokens = max(0, request.sampling.min_tokens - request.num_given)
        return StreamDecoder(self.tokenizer, request.sampling.stop, min_tokens)

    def _note_step(self, launched: Launched, commits: Many[Commit]) -> None:
        now = time.perf_counter()
        accepted = sum(len(commit.token_ids) for commit in commits)
        self._acceptance.note(min(launched.width, self.config.depth), commits)
        pool = self.scheduler.pool
        milliseconds = 1000 * (now - self._read_at)
        # Between two results the host also launches the step that follows, prompts to read included.
        if launched.alone and (self._in_flight is None or self._in_flight.alone):
            self.policy.measured(len(launched.rows), launched.width, milliseconds, launched.work)
        self.last_step = StepStats(
            rows=len(launched.rows),
            window=launched.width,
            accepted=accepted,
            milliseconds=milliseconds,
            unfinished=self.num_unfinished,
            waiting=len(self.scheduler.waiting),
            cache_used=1 - pool.num_available / (pool.num_blocks - 1),
        )
        self._read_at = now


def check_vocabulary(request: DecodeRequest, size: int) -> None:
    """Raise InputError for a token of the request that a model with `size` embeddings does not know."""
    for name, tokens in (("prompt_ids", request.prompt_ids), ("stop_token_ids", request.sampling.stop_token_ids)):
        for token in tokens:
            if not 0 <= token < size:
                raise InputError(f"{name}: token {token} is not in the vocabulary of {size}")


class _Adds(Protocol):
    def add(self, request: DecodeRequest) -> int: ...

    def abort(self, key: int) -> None: ...


@contextmanager
def added(engine: _Adds, requests: Many[DecodeRequest]) -> Iterator[list[int]]:
    """Keys of requests added to an engine. Whatever ends the block early, a refusal of one of them included, aborts
    those that are not finished.
    """
    keys: list[int] = []
    try:
        for request in requests:
            keys.append(engine.add(request))
        yield keys
    except BaseException:
        for key in keys:
            engine.abort(key)
        raise


def run_to_end(engine: Engine, keys: Many[int], step: Callable[[], object]) -> list[DecodeResult]:
    """Step until these requests are finished; their results."""
    sequences = [engine.sequence(key) for key in keys]
    while any(sequence.finish_reason is None for sequence in sequences):
        step()
    return [sequence.result() for sequence in sequences]


def _logprobs(found: Logprobs | None, outcome: Outcome, count: int) -> tuple[TokenLogprob, ...] | None:
    """Those of the first `count` predictions of an outcome, if its request asked for them."""
    asked = outcome.row.request.sampling.logprobs
    if asked is None or found is None:
        return None
    columns = list(outcome.columns[:count])
    of_row = (found.chosen_BW, found.top_ids_BWK, found.top_BWK)
    chosen, top_ids, top = (column[outcome.place, columns].tolist() for column in of_row)
    return tuple(
        TokenLogprob(logprob, tuple(zip(ids[:asked], values[:asked], strict=True)))
        for logprob, ids, values in zip(chosen, top_ids, top, strict=True)
    )


def _check(config: EngineConfig, model: DecoderModel) -> None:
    if config.max_tokens > model.shape.max_positions:
        raise InputError(f"max_tokens={config.max_tokens} exceeds the model's {model.shape.max_positions} positions")
