"""An engine in a process of its own.

Threads of one Python process take turns. In a server, the thread that talks to clients would hold up the one that
launches steps, for longer than a step takes. So the engine steps in a child, by itself as long as it has requests, and
what it commits waits in a pipe until somebody asks.
"""

import multiprocessing
import pickle
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, field, fields
from itertools import count
from multiprocessing.connection import Connection
from operator import attrgetter

from cllm.decoding.backend import Backend, RequestFailedError, generate
from cllm.decoding.records import Commit, DecodeRequest, DecodeResult
from cllm.decoding.stats import BackendStats, StepStats
from cllm.engine.children import live_with_parent
from cllm.errors import InputError

_FAREWELL_S = 10.0
# Objects take four times as long to pickle as tuples of what is in them: 55 us, not 14, for the commits of 32 rows.
_Packed = tuple[object, ...]
_fields_of = attrgetter(*(of_commit.name for of_commit in fields(Commit) if of_commit.name != "row"))


class ProcessLostError(RuntimeError):
    """The process that holds the engine has died."""


# From parent to child, in the order of sending.


@dataclass(frozen=True, slots=True)
class _Add:
    key: int
    request: DecodeRequest


@dataclass(frozen=True, slots=True)
class _Abort:
    key: int


@dataclass(frozen=True, slots=True)
class _TellStats:
    pass


@dataclass(frozen=True, slots=True)
class _Close:
    pass


_Command = _Add | _Abort | _TellStats | _Close


# From child to parent.


@dataclass(frozen=True, slots=True)
class _Ready:
    pass


@dataclass(frozen=True, slots=True)
class _Ended:
    """By this error, which a step raised or the loading."""

    error: Exception


@dataclass(frozen=True, slots=True)
class _Refused:
    key: int
    error: InputError


@dataclass(frozen=True, slots=True)
class _Failed:
    """A step that gave up a request."""

    key: int
    reason: str
    commits: Sequence[_Packed]


_Step = tuple[Sequence[_Packed], _Packed | None]  # commits and the step's statistics
_Report = _Ready | _Ended | _Refused | _Failed | BackendStats | _Step


class ProcessEngine:
    """Implements `Backend` for an engine in a child process, which ends with this one.

    Args:
        load: called in the child, so it must be picklable.

    Raises:
        Exception: what `load` raises.
        ProcessLostError: the child died before its engine was ready.
    """

    def __init__(self, load: Callable[[], Backend]) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_live, args=(theirs, load), name="engine", daemon=True)
        self._process.start()
        theirs.close()  # else its end would not be noticed here
        self._keys = count()
        self._open: set[int] = set()
        self._early: list[_Report] = []  # came while something else was waited for
        self._last_step: StepStats | None = None
        self._receive()

    @property
    def num_unfinished(self) -> int:
        """Requests added, and neither finished nor aborted, as far as has been told by `step`."""
        return len(self._open)

    @property
    def last_step(self) -> StepStats | None:
        return self._last_step

    def add(self, request: DecodeRequest) -> int:
        """Queue a request. A refusal comes from `step`: the engine is busy with one."""
        key = next(self._keys)
        self._send(_Add(key, request))
        self._open.add(key)
        return key

    def abort(self, key: int) -> None:
        if key in self._open:
            self._open.remove(key)
            self._send(_Abort(key))

    def step(self) -> list[Commit]:
        """Wait for the next step that the child has done; at once if it has done some already.

        Raises:
            RequestFailedError: as `Backend.step`, or the engine has refused a request (`refusal`).
            ProcessLostError: the child has died.
        """
        if not self._open:
            return []
        self._last_step = None
        report = self._early.pop(0) if self._early else self._receive()
        if isinstance(report, _Refused):
            if report.key in self._open:
                self._open.remove(report.key)
                raise RequestFailedError(report.key, str(report.error), (), report.error)
            return []
        if isinstance(report, _Failed):
            commits = self._told(report.commits)
            self._open.discard(report.key)
            raise RequestFailedError(report.key, report.reason, commits)
        assert isinstance(report, tuple)
        packed, stats = report
        self._last_step = None if stats is None else StepStats(*stats)  # type: ignore[arg-type]  # as they were packed
        return self._told(packed)

    def generate(self, requests: Sequence[DecodeRequest]) -> list[DecodeResult]:
        return generate(self, requests)

    def stats(self) -> BackendStats:
        self._send(_TellStats())
        while not isinstance(report := self._receive(), BackendStats):
            self._early.append(report)
        return report

    def check(self) -> None:
        """Raise ProcessLostError if the child has died. Any thread may ask."""
        if not self._process.is_alive():
            raise self._lost()

    def close(self) -> None:
        with suppress(OSError):  # it may have died
            self._send(_Close())
        self._process.join(_FAREWELL_S)
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _told(self, packed: Iterable[_Packed]) -> list[Commit]:
        """Commits of requests that are still wanted."""
        commits = [Commit(*values) for values in packed if values[0] in self._open]  # type: ignore[arg-type]
        self._open.difference_update(commit.row for commit in commits if commit.finish_reason is not None)
        return commits

    def _send(self, command: _Command) -> None:
        self._pipe.send(command)

    def _receive(self) -> _Report:
        try:
            report: _Report = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(_FAREWELL_S)
            raise self._lost() from error
        if isinstance(report, _Ended):
            raise report.error
        return report

    def _lost(self) -> ProcessLostError:
        return ProcessLostError(f"the engine's process has died (exit code {self._process.exitcode}); the log says why")


def _live(pipe: Connection, load: Callable[[], Backend]) -> None:
    """The life of the child."""
    live_with_parent()
    try:
        engine = load()
    except Exception as error:
        pipe.send(_Ended(_portable(error)))
        return
    pipe.send(_Ready())
    try:
        _Child(engine, pipe).run()
    except Exception as error:
        pipe.send(_Ended(_portable(error)))
    finally:
        engine.close()


@dataclass(slots=True)
class _Child:
    """Steps an engine as long as it has requests, and does what it is told in between."""

    engine: Backend
    pipe: Connection
    theirs: dict[int, int] = field(default_factory=dict)  # the parent's keys, by the engine's
    ours: dict[int, int] = field(default_factory=dict)

    def run(self) -> None:
        while self._obey():
            try:
                commits = self.engine.step()
            except RequestFailedError as error:
                key = self.theirs[error.key]
                self.pipe.send(_Failed(key, error.reason, self._packed(error.commits)))
                self._forget(error.key)
            else:
                stats = self.engine.last_step
                self.pipe.send((self._packed(commits), None if stats is None else astuple(stats)))

    def _obey(self) -> bool:
        """Carry out what was asked for, waiting while there is nothing to decode; False once told to end."""
        while self.engine.num_unfinished == 0 or self.pipe.poll():
            command: _Command = self.pipe.recv()
            if isinstance(command, _Close):
                return False
            if isinstance(command, _Add):
                self._add(command)
            elif isinstance(command, _Abort):
                self._abort(command.key)
            else:
                self.pipe.send(self.engine.stats())
        return True

    def _add(self, command: _Add) -> None:
        try:
            key = self.engine.add(command.request)
        except InputError as error:
            self.pipe.send(_Refused(command.key, error))
        else:
            self.theirs[key], self.ours[command.key] = command.key, key

    def _abort(self, their_key: int) -> None:
        key = self.ours.get(their_key)
        if key is not None:  # else it is finished, or was refused
            self.engine.abort(key)
            self._forget(key)

    def _packed(self, commits: Iterable[Commit]) -> list[_Packed]:
        packed = []
        for commit in commits:
            if commit.row in self.theirs:
                packed.append((self.theirs[commit.row], *_fields_of(commit)))
                if commit.finish_reason is not None:
                    self._forget(commit.row)
        return packed

    def _forget(self, key: int) -> None:
        del self.ours[self.theirs.pop(key)]


def _portable(error: Exception) -> Exception:
    """The error, or one that says the same and can be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
