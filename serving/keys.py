"""API keys: who asks, and whether they may now."""

import hashlib
import hmac
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastapi import status
from pydantic import TypeAdapter, ValidationError

from cllm.errors import InputError
from serving.config import Keys
from serving.errors import ApiError


class Caller:
    """The holder of one key, with its limits: a bucket of requests that refills evenly, and requests at a time."""

    def __init__(self, name: str, limits: Keys, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self._limits = limits
        self._clock = clock
        self._tokens = float(limits.requests_per_minute or 0)
        self._filled_at = clock()
        self._running = 0

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Count a request while it runs.

        Raises:
            ApiError: 429, too many or too often.
        """
        if self._limits.concurrent is not None and self._running >= self._limits.concurrent:
            raise _too_many(f"this key may have {self._limits.concurrent} requests at a time", 1)
        if self._limits.requests_per_minute is not None:
            self._take(self._limits.requests_per_minute)
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    def _take(self, per_minute: int) -> None:
        now = self._clock()
        self._tokens = min(per_minute, self._tokens + (now - self._filled_at) * per_minute / 60)
        self._filled_at = now
        if self._tokens < 1:
            wait_s = math.ceil((1 - self._tokens) * 60 / per_minute)
            raise _too_many(f"this key may make {per_minute} requests a minute", wait_s)
        self._tokens -= 1


class KeyRing:
    """All keys. None are compared in a time that depends on what was sent.

    Args:
        keys: name -> key.
    """

    def __init__(self, keys: dict[str, str], limits: Keys) -> None:
        self._callers = [(_digest(key), Caller(name, limits)) for name, key in keys.items()]

    @classmethod
    def load(cls, config: Keys) -> "KeyRing":
        """Read the keys' file and environment variable.

        Raises:
            InputError: an unreadable file, an empty key, or no keys at all.
        """
        keys = {} if config.file is None else _from_file(Path(config.file))
        if config.env is not None:
            found = [key.strip() for key in os.environ.get(config.env, "").split(",") if key.strip()]
            keys |= {f"{config.env}[{i}]": key for i, key in enumerate(found)}
        if not keys:
            raise InputError(f"keys: none found (file {config.file}, environment variable {config.env})")
        return cls(keys, config)

    def find(self, authorization: str | None) -> Caller:
        """The holder of the key in an Authorization header.

        Raises:
            ApiError: 401.
        """
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise _unauthorised("no API key: send the header Authorization: Bearer KEY")
        digest, found = _digest(key.strip()), None
        for known, caller in self._callers:
            if hmac.compare_digest(known, digest):
                found = caller
        if found is None:
            raise _unauthorised("wrong API key")
        return found


def _from_file(path: Path) -> dict[str, str]:
    try:
        keys = TypeAdapter(dict[str, str]).validate_python(json.loads(path.read_text()))
    except (OSError, ValueError, ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else "expected a JSON object, name -> key"
        raise InputError(f"keys.file {path}: {reason}") from None  # the cause would show keys
    if not all(key.strip() for key in keys.values()):
        raise InputError(f"keys.file {path}: an empty key")
    return {name: key.strip() for name, key in keys.items()}


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _unauthorised(message: str) -> ApiError:
    return ApiError(status.HTTP_401_UNAUTHORIZED, message, code="invalid_api_key")


def _too_many(message: str, retry_after_s: int) -> ApiError:
    return ApiError(status.HTTP_429_TOO_MANY_REQUESTS, message, code="rate_limit_exceeded", retry_after_s=retry_after_s)
