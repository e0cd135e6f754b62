"""An asyncio front of an engine: one thread owns the engine and with it the GPU, coroutines own requests."""

import asyncio
import queue
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress

from cllm.decoding.backend import Backend, RequestFailedError
from cllm.decoding.records import Commit, DecodeRequest
from cllm.decoding.stats import StepStats


class EngineStoppedError(RuntimeError):
    """The engine's thread has ended; no request can be answered any more."""


class _Stream:
    """A request's way back. The engine's thread wakes the coroutine's loop only for the first item that waits and for
    the last one of all: between them an item costs it no more than an append."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.key: int | None = None
        self._loop = loop
        self._items: deque[Commit | Exception] = deque()
        self._news, self._over = asyncio.Event(), asyncio.Event()
        self._told = False  # the loop knows that there are items

    def put(self, item: Commit | Exception) -> None:
        """Called on the engine's thread."""
        self._items.append(item)
        is_last = isinstance(item, Exception) or item.finish_reason is not None
        try:
            if not self._told:
                self._told = True
                self._loop.call_soon_threadsafe(self._news.set)
            if is_last:
                self._loop.call_soon_threadsafe(self._over.set)
        except RuntimeError:  # its loop is closed: nobody listens any more
            return

    async def take(self) -> list[Commit | Exception]:
        """All items that wait, as soon as there is one."""
        items: list[Commit | Exception] = []
        while not items:
            await self._news.wait()
            self._news.clear()
            self._told = False  # before the items are taken: one that comes meanwhile may tell in vain, but is not lost
            while self._items:
                items.append(self._items.popleft())
        return items

    async def rest(self, seconds: float) -> None:
        """Return after so long, or when the last item is there."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._over.wait()


class AsyncEngine:
    """Runs an engine on a thread of its own.

    Args:
        make: builds the engine, called on that thread: CUDA state belongs to the thread that made it.
        on_step: called on the thread after every step, for metrics.
        on_idle: called on the thread before it waits, with nothing left to decode; after an abort no step tells that.
    """

    def __init__(
        self,
        make: Callable[[], Backend],
        on_step: Callable[[StepStats], None] | None = None,
        on_idle: Callable[[], None] | None = None,
    ) -> None:
        self._make = make
        self._on_step = on_step
        self._on_idle = on_idle
        self._engine: Backend | None = None  # for `check`, which may come from any thread
        self._commands: queue.SimpleQueue[Callable[[Backend], None] | None] = queue.SimpleQueue()
        self._streams: dict[int, _Stream] = {}  # by the engine's key; the thread's own
        self._open: set[_Stream] = set()  # those that somebody listens to
        self._lock = threading.Lock()  # guards _open and _stopped
        self._stopped = False
        self._error: Exception | None = None
        self._ready = threading.Event()
        self.steps = 0  # a health check sees by it whether the loop is stuck
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def wait_ready(self, timeout: float | None = None) -> None:
        """Return when the engine is built.

        Raises:
            Exception: what building it raised.
            TimeoutError: it takes longer.
        """
        if not self._ready.wait(timeout):
            raise TimeoutError(f"the engine is not ready after {timeout} s")
        if self._error is not None:
            raise self._error

    def check(self) -> None:
        """Return if the engine runs.

        Raises:
            EngineStoppedError: it has failed or was closed.
            Exception: what ended it, where no step has told yet.
        """
        with self._lock:
            self._check_running()
            engine = self._engine
        if engine is not None:
            engine.check()

    @property
    def num_unfinished(self) -> int:
        """Requests that the engine has not finished, whether or not their coroutines have read all of it."""
        return len(self._streams)

    async def stream(self, request: DecodeRequest) -> AsyncGenerator[Commit, None]:
        """What each step commits to the request, until it is finished. Closing the iterator aborts the request.

        Raises:
            InputError: the engine refuses the request.
            RequestFailedError: the engine gave the request up.
            EngineStoppedError: the engine has failed or was closed.
        """
        async with aclosing(self.bursts(request)) as bursts:
            async for burst in bursts:
                for commit in burst:
                    yield commit

    async def bursts(
        self, request: DecodeRequest, pause_s: Callable[[], float] = lambda: 0.0
    ) -> AsyncGenerator[list[Commit], None]:
        """As `stream`, with the commits of several steps together.

        Args:
            pause_s: asked behind each burst; so long (seconds) commits gather for the next one, unless the response
                ends before. The first burst is never held up.

        Raises:
            As `stream`, behind the commits before the error.
        """
        stream = _Stream(asyncio.get_running_loop())
        with self._lock:
            self._check_running()
            self._open.add(stream)
        self._commands.put(lambda engine: self._add(engine, request, stream))
        finished = False
        try:
            while not finished:
                items = await stream.take()
                commits = [item for item in items if not isinstance(item, Exception)]
                finished = bool(commits) and commits[-1].finish_reason is not None
                if commits:
                    yield commits
                if isinstance(items[-1], Exception):
                    raise items[-1]
                if not finished and (seconds := pause_s()) > 0:
                    await stream.rest(seconds)
        finally:
            with self._lock:
                self._open.discard(stream)
            if not finished:
                self._commands.put(lambda engine: self._abort(engine, stream))

    def close(self) -> None:
        """End the engine and its thread after the step it is in; streams that still run get an error."""
        self._commands.put(None)
        self._thread.join()

    def _check_running(self) -> None:
        if self._stopped:
            raise self._stop_error()

    def _stop_error(self) -> EngineStoppedError:
        return EngineStoppedError(f"the engine has stopped: {self._error or 'closed'}")

    def _add(self, engine: Backend, request: DecodeRequest, stream: _Stream) -> None:
        try:
            stream.key = engine.add(request)
        except ValueError as error:
            stream.put(error)
        else:
            self._streams[stream.key] = stream

    def _abort(self, engine: Backend, stream: _Stream) -> None:
        if stream.key is not None and self._streams.pop(stream.key, None) is not None:
            engine.abort(stream.key)

    def _run(self) -> None:
        try:
            self._engine = self._make()
            self._ready.set()
            self._work(self._engine)
        except Exception as error:
            self._error = error
        finally:
            with self._lock:  # whoever comes later is told at once
                self._stopped = True
                listening = list(self._open)
            self._ready.set()
            for stream in listening:
                stream.put(self._stop_error())
            if self._engine is not None:
                self._engine.close()

    def _work(self, engine: Backend) -> None:
        while self._obey(engine):
            self._deliver(self._step(engine))
            self.steps += 1
            if self._on_step is not None and engine.last_step is not None:
                self._on_step(engine.last_step)

    def _step(self, engine: Backend) -> list[Commit]:
        try:
            return engine.step()
        except RequestFailedError as error:
            stream = self._streams.pop(error.key, None)
            if stream is not None:
                stream.put(error.refusal or error)
            return error.commits

    def _obey(self, engine: Backend) -> bool:
        """Carry out what was asked for, waiting while there is nothing to decode; False once closed."""
        while True:
            is_idle = engine.num_unfinished == 0
            if is_idle and self._on_idle is not None:
                self._on_idle()
            try:
                command = self._commands.get(block=is_idle)
            except queue.Empty:
                return True
            if command is None:
                return False
            command(engine)

    def _deliver(self, commits: list[Commit]) -> None:
        for commit in commits:
            stream = self._streams.get(commit.row)
            if stream is None:
                continue
            stream.put(commit)
            if commit.finish_reason is not None:
                del self._streams[commit.row]
