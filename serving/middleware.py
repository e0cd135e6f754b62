"""What happens to every request before it is read: an id and a log line, a key, and a bound on its body.

Plain ASGI, for each spans the whole response: a stream ends long after its handler has returned.
"""

import asyncio
import json
import logging
import re
import time
import uuid
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from fastapi import status
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.config import Limits
from serving.errors import ApiError
from serving.keys import KeyRing

_ID = re.compile(r"[\w.-]{1,128}", re.ASCII)
_GUARDED = ("/v1/", "/metrics")
_LOGGED_PATH = 200  # characters
_log = logging.getLogger("ray.serve")  # goes where Serve's own lines go


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status_code, error.headers())


class RequestLog:
    """Gives each request an id (its own header's, or a new one) and writes a line when it is over.

    Handlers add what they know to `request.state.log`; neither prompts nor texts. The line says all of it to a reader,
    and where Serve writes its log as JSON, the record's key `request` says it to programs.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = Headers(scope=scope).get("x-request-id")
        request_id = asked if asked is not None and _ID.fullmatch(asked) else uuid.uuid4().hex
        record: dict[str, Any] = {"id": request_id, "path": scope["path"][:_LOGGED_PATH], "status": None}
        scope.setdefault("state", {}).update(request_id=request_id, log=record, arrived_at=time.time())
        started = time.perf_counter()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record["status"] = message["status"]
                if asked is None:  # else the client knows it; Serve's proxy gives every request one, and adds it itself
                    MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            record["seconds"] = round(time.perf_counter() - started, 6)
            line = " ".join(f"{key}={json.dumps(value)}" for key, value in record.items())
            _log.info("request %s", line, extra={"request": record})


class KeyCheck:
    """Lets nobody without a key at the API and the metrics, and none too often."""

    def __init__(self, app: ASGIApp, keys: KeyRing) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._admitted(scope):
                await self._app(scope, receive, send)
        except ApiError as error:
            await error_response(error)(scope, receive, send)

    def _admitted(self, scope: Scope) -> AbstractContextManager[None]:
        if scope["type"] != "http" or not scope["path"].startswith(_GUARDED):
            return nullcontext()
        caller = self._keys.find(Headers(scope=scope).get("authorization"))
        scope["state"]["log"]["key"] = caller.name
        return caller.admitted()


class BodyLimit:
    """Reads the whole body first, so that neither a long nor a slow one gets any further."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._limits.body_s):
                body = await self._read(Headers(scope=scope), receive)
        except TimeoutError:
            too_slow = ApiError(status.HTTP_408_REQUEST_TIMEOUT, f"no whole body within {self._limits.body_s:g} s")
            await error_response(too_slow)(scope, receive, send)
            return
        except ApiError as error:
            await error_response(error)(scope, receive, send)
            return
        if body is None:
            return  # the client has gone
        pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        await self._app(scope, replay, send)

    async def _read(self, headers: Headers, receive: Receive) -> bytes | None:
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._limits.body_bytes:
            raise self._too_large()
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._limits.body_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return bytes(body)

    def _too_large(self) -> ApiError:
        return ApiError(
            status.HTTP_413_CONTENT_TOO_LARGE,
            f"the body is larger than {self._limits.body_bytes} bytes",
            code="request_too_large",
        )
