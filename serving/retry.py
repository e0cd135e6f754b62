"""A response that outlives the replica that began it.

Noise depends on seed and position only, so another replica continues a response as the first one would have.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from serving.errors import OverloadedError, ReplicaLostError
from serving.messages import Chunk, GenerateRequest, Responder

_SHORTEST_S, _LONGEST_S = 0.05, 1.0  # pauses: each is twice as long as the one before
_log = logging.getLogger("ray.serve")


class RetryingBackend:
    """Carries on with another replica behind the tokens already given when one is lost.

    A request that nothing was given to is refused when the queue is full. A response that has begun is not: when its
    replica is lost, the queues of the others are likely to be full, with what they take over as well.

    Args:
        attempts: replicas lost in a row without a chunk, until it gives up.
        resume_s: seconds from a loss, until a response that has begun gives up on full queues.
    """

    def __init__(self, backend: Responder, attempts: int, resume_s: float) -> None:
        self._backend = backend
        self._attempts = attempts
        self._resume_s = resume_s

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """As the backend's, but ReplicaLostError only after all attempts, and OverloadedError as said above."""
        lost, lost_at, pause_s = 0, time.monotonic(), _SHORTEST_S
        while True:
            finished = False
            try:
                async with aclosing(self._backend.generate(request)) as chunks:
                    async for chunk in chunks:
                        lost, pause_s = 0, _SHORTEST_S
                        request = replace(request, given=request.given.plus(chunk))
                        finished = chunk.finish_reason is not None
                        yield chunk
                if finished:
                    return
                raise ReplicaLostError("the replica left the response unfinished")
            except ReplicaLostError as error:
                if finished:
                    return
                lost, lost_at = lost + 1, time.monotonic()
                _log.warning("request %s: %s after %d tokens", request.request_id, error, len(request.given.token_ids))
                if lost == self._attempts:
                    raise
            except OverloadedError:
                if not request.given.token_ids or time.monotonic() - lost_at > self._resume_s:
                    raise
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_S)
