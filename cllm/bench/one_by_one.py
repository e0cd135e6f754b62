"""A decoder that takes one request at a time, as a `Backend`."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from cllm.decoding.backend import generate
from cllm.decoding.records import Commit, DecodeRequest, DecodeResult
from cllm.decoding.stats import BackendStats, Package, StepStats, device_memory_bytes, package_version
from cllm.models import default_device


class OneByOne:
    """Serves requests in the order of their arrival.

    Args:
        stream: decodes one request, yielding what was committed; rows do not matter.
        method, package: how, and whose code.
    """

    last_step: StepStats | None = None

    def __init__(
        self,
        stream: Callable[[DecodeRequest], Iterator[list[Commit]]],
        *,
        method: str = "generate",
        package: Package = "transformers",
    ) -> None:
        self._stream = stream
        self._method = method
        self._package: Package = package
        self._waiting: deque[tuple[int, DecodeRequest]] = deque()
        self._current: tuple[int, Iterator[list[Commit]]] | None = None
        self._next_key = 0

    @property
    def num_unfinished(self) -> int:
        return len(self._waiting) + (self._current is not None)

    def add(self, request: DecodeRequest) -> int:
        key, self._next_key = self._next_key, self._next_key + 1
        self._waiting.append((key, request))
        return key

    def abort(self, key: int) -> None:
        if self._current is not None and self._current[0] == key:
            self._current = None
        self._waiting = deque(item for item in self._waiting if item[0] != key)

    def step(self) -> list[Commit]:
        if self._current is None:
            if not self._waiting:
                return []
            key, request = self._waiting.popleft()
            self._current = key, self._stream(request)
        key, stream = self._current
        commits = [Commit(key, commit.token_ids, commit.finish_reason) for commit in next(stream)]
        if commits[-1].finish_reason is not None:
            self._current = None
        return commits

    def generate(self, requests: Sequence[DecodeRequest]) -> list[DecodeResult]:
        return generate(self, requests)

    def stats(self) -> BackendStats:
        return BackendStats(
            method=self._method,
            package=self._package,
            version=package_version(self._package),
            runner=None,
            scheduling="sync",
            guesses=0,
            memory_bytes=device_memory_bytes(default_device()),
            acceptance=None,
        )

    def check(self) -> None:
        """Nothing can end it without a step telling."""

    def close(self) -> None:
        """It depends on no other process."""
