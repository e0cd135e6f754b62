"""From a request's body to its response: one stream of chunks a choice, written as they come or all at once."""

import hashlib
import json
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import Response, status
from fastapi.responses import StreamingResponse
from starlette.datastructures import State

from cllm.errors import InputError
from serving.config import Limits
from serving.errors import ApiError, OverloadedError, ReplicaLostError
from serving.merging import merge
from serving.messages import Chunk, GenerateRequest, Responder
from serving.protocol import ChatRequest, CompletionRequest, GenerationRequest
from serving.responses import ChatFormat, Choice, CompletionFormat, Format, usage_of

_log = logging.getLogger("ray.serve")
_SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies are to pass chunks on at once
_LOGGED_USER = 64  # characters of the client's own name for its user
Chunks = AsyncGenerator[tuple[Choice, Chunk], None]


class Service:
    """Answers bodies with backends.

    Args:
        backends: by model name.
        retry_after_s: told to clients that are refused because of load.
    """

    def __init__(self, backends: Mapping[str, Responder], limits: Limits, retry_after_s: int) -> None:
        self._backends = backends
        self._limits = limits
        self._retry_after_s = retry_after_s

    @property
    def models(self) -> list[str]:
        return list(self._backends)

    async def complete(self, body: CompletionRequest, state: State) -> Response:
        return await self._answer(body, CompletionFormat(body.model, decoding=bool(body.decoding)), state)

    async def chat(self, body: ChatRequest, state: State) -> Response:
        return await self._answer(body, ChatFormat(body.model, decoding=bool(body.decoding)), state)

    def api_error(self, error: Exception, request_id: str) -> ApiError:
        """What the client is told of a failure: nothing of our insides."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, InputError):
            return ApiError(status.HTTP_400_BAD_REQUEST, str(error))
        if isinstance(error, OverloadedError | ReplicaLostError):
            return ApiError(
                status.HTTP_503_SERVICE_UNAVAILABLE,
                str(error) if isinstance(error, OverloadedError) else "no replica could answer; try again",
                code="overloaded",
                retry_after_s=self._retry_after_s,
            )
        _log.error("request %s failed", request_id, exc_info=error)
        return ApiError(status.HTTP_500_INTERNAL_SERVER_ERROR, f"internal error; request id {request_id}")

    async def _answer(self, body: GenerationRequest, form: Format, state: State) -> Response:
        """Wait for the first chunk, so that what is refused is refused with a status of its own."""
        backend = self._backends.get(body.model)
        if backend is None:
            raise ApiError(
                status.HTTP_404_NOT_FOUND,
                f"the model {body.model!r:.200} does not exist; there are {', '.join(self._backends)}",
                code="model_not_found",
                param="model",
            )
        requests = self._requests(body, state)
        choices = [Choice(index) for index in range(len(requests))]
        state.log.update(model=body.model, stream=bool(body.stream), choices=len(choices))
        if body.user is not None:
            state.log["user"] = body.user[:_LOGGED_USER]
        chunks = _followed([backend.generate(request) for request in requests], choices, state.log)
        if body.stream:
            first = await _first(chunks)
            events = self._events(body, form, choices, chunks, first, state)
            return StreamingResponse(events, media_type="text/event-stream", headers=_SSE_HEADERS)
        async with aclosing(chunks):
            async for _ in chunks:
                pass
        whole = form.whole(choices, usage_of(choices, body.num_choices))
        return Response(whole.model_dump_json(), media_type="application/json")

    def _requests(self, body: GenerationRequest, state: State) -> list[GenerateRequest]:
        prompts = body.prompts()
        if len(prompts) * body.num_choices > self._limits.choices:
            raise InputError(
                f"{len(prompts)} prompts with n={body.num_choices} ask for more than {self._limits.choices} responses"
            )
        if self._limits.new_tokens is not None and (body.max_new_tokens or 0) > self._limits.new_tokens:
            raise InputError(f"max_tokens={body.max_new_tokens} is more than {self._limits.new_tokens}")
        sampling = body.sampling()
        # A chat without a limit may fill the context, but no more than anybody may ask for.
        max_new_tokens = self._limits.new_tokens if body.max_new_tokens is None else body.max_new_tokens
        return [
            GenerateRequest(
                request_id=state.request_id,
                prompt=prompt,
                max_new_tokens=max_new_tokens,
                sampling=replace(sampling, seed=_seed(sampling.seed, index)),
                arrived_at=state.arrived_at,
                guesses=body.wants_guesses,
                delivery=body.delivery,
            )
            for prompt in prompts
            for index in range(body.num_choices)
        ]

    async def _events(
        self,
        body: GenerationRequest,
        form: Format,
        choices: list[Choice],
        chunks: Chunks,
        first: tuple[Choice, Chunk],
        state: State,
    ) -> AsyncGenerator[str, None]:
        """Server-sent events; an error behind the first chunk comes as an event, ends them, and is logged: the status
        has been sent and says nothing of it."""
        try:
            async with aclosing(chunks):
                yield _event(form.piece(*first).model_dump_json())
                async for choice, chunk in chunks:
                    yield _event(form.piece(choice, chunk).model_dump_json())
        except Exception as error:
            told = self.api_error(error, state.request_id)
            state.log["error"] = told.code or told.kind
            yield _event(json.dumps(told.body()))
            return
        if body.include_usage:
            yield _event(form.usage_piece(usage_of(choices, body.num_choices)).model_dump_json())
        yield _event("[DONE]")


async def _followed(streams: list[AsyncGenerator[Chunk, None]], choices: list[Choice], log: dict[str, Any]) -> Chunks:
    """The chunks of all choices, noted in them and, at the end, in the log."""
    try:
        async with aclosing(merge(streams)) as merged:
            async for index, chunk in merged:
                choices[index].add(chunk)
                yield choices[index], chunk
    finally:
        log["completion_tokens"] = sum(sum(choice.accepted) for choice in choices)
        log["steps"] = sum(len(choice.accepted) for choice in choices)


async def _first(chunks: Chunks) -> tuple[Choice, Chunk]:
    try:
        return await anext(chunks)
    except BaseException:
        await chunks.aclose()
        raise


def _seed(seed: int, choice: int) -> int:
    """Of the n responses to one prompt; the first has the request's own."""
    if choice == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}/{choice}".encode(), digest_size=8).digest()) >> 1


def _event(data: str) -> str:
    return f"data: {data}\n\n"
