"""The replicas of a Serve deployment, as a backend."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator

from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from cllm.errors import InputError
from serving.errors import OverloadedError, ReplicaFailedError, ReplicaLostError
from serving.messages import Chat, Chunk, GenerateRequest, Prompt
from serving.replica import Replica

_PREFIX_CHARACTERS = 512
_PREFIX_TOKENS = 128


class ServeBackend:
    """Calls a deployment of `serving.replica.Replica`, and tells its failures in our words.

    Args:
        by_prefix: prompts that begin alike go to the same replica, which has their beginning in its cache.
    """

    def __init__(self, handle: DeploymentHandle[Replica], *, by_prefix: bool) -> None:
        self._handle = handle.options(stream=True)
        self._by_prefix = by_prefix

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """As `Responder.generate`."""
        handle = self._handle.options(session_id=prefix_key(request.prompt)) if self._by_prefix else self._handle
        call = handle.generate.remote(request)
        assert isinstance(call, DeploymentResponseGenerator)
        try:
            async for chunk in call:
                yield chunk
        except BackPressureError as error:
            raise OverloadedError("too many requests wait already; try again") from error
        except DeploymentUnavailableError as error:
            raise OverloadedError("the model has no replica at the moment; try again") from error
        except RayTaskError as error:  # also an instance of its cause's class, but with a traceback as its message
            raise _cause(error) from error
        except (RayActorError, ActorUnavailableError) as error:
            raise ReplicaLostError("the replica died") from error
        except GeneratorExit:
            call.cancel()
            raise
        except asyncio.CancelledError:
            if not _is_cancelled():
                raise ReplicaLostError("the replica gave up the request") from None  # it is being replaced
            call.cancel()
            raise


def prefix_key(prompt: Prompt) -> str:
    """Equal for prompts that begin alike."""
    if isinstance(prompt, Chat):
        prompt = "\n".join(f"{role}: {content}" for role, content in prompt.messages)
    beginning = prompt[:_PREFIX_CHARACTERS] if isinstance(prompt, str) else prompt[:_PREFIX_TOKENS]
    return hashlib.sha256(repr(beginning).encode()).hexdigest()[:16]


def _is_cancelled() -> bool:
    """Whether the cancellation is of this task, and not one that came from the replica."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _cause(error: RayTaskError) -> Exception:
    cause = error.cause
    return cause if isinstance(cause, InputError | ReplicaLostError) else ReplicaFailedError(str(cause))
