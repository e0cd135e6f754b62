"""A response that outlives the replica that began it.

Noise depends on seed and position only, so another replica continues a response as the first one would have.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from serving.errors import ReplicaLostError
from serving.messages import Backend, Chunk, GenerateRequest

_PAUSE_S = 0.05  # before the second attempt, then twice as long each time


class RetryingBackend:
    """Carries on with another replica behind the tokens already given when one is lost.

    Args:
        attempts: gives up after so many in a row without a chunk.
    """

    def __init__(self, backend: Backend, attempts: int) -> None:
        self._backend = backend
        self._attempts = attempts

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """As the backend's, but ReplicaLostError only after all attempts."""
        failures, finished = 0, False
        while not finished:
            try:
                async with aclosing(self._backend.generate(request)) as chunks:
                    async for chunk in chunks:
                        failures = 0
                        request = replace(request, given=request.given.plus(chunk))
                        finished = chunk.finish_reason is not None
                        yield chunk
                if not finished:
                    raise ReplicaLostError("the replica left the response unfinished")
            except ReplicaLostError:
                if finished:
                    return
                failures += 1
                if failures == self._attempts:
                    raise
                await asyncio.sleep(_PAUSE_S * 2 ** (failures - 1))
