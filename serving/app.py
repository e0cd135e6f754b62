"""The HTTP application: routes, and errors in OpenAI's form. Knows nothing of Ray."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response, status
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

from serving import protocol
from serving.config import Limits
from serving.errors import ApiError
from serving.keys import KeyRing
from serving.middleware import BodyLimit, KeyCheck, RequestLog, error_response
from serving.service import Service

_PAGE = Path(__file__).parent / "page"
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": protocol.ErrorResponse, "description": "Refused; the message names the field"},
    "5XX": {"model": protocol.ErrorResponse, "description": "Try again after Retry-After, or a defect"},
}


_REF = "#/components/schemas/{model}"


def _streams(whole: type[BaseModel], chunk: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI page: with stream true, the response is a stream of events, each with a chunk."""
    either = [{"$ref": _REF.format(model=model.__name__)} for model in (chunk, protocol.ErrorResponse)]
    data = {
        "type": "string",
        "description": "A chunk; [DONE] behind the last one. An error, which ends the stream, has a chunk's place.",
        "anyOf": [
            {"const": "[DONE]"},
            {"contentMediaType": "application/json", "contentSchema": {"anyOf": either}},
        ],
    }
    event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    return {200: {"model": whole, "content": {"text/event-stream": {"itemSchema": event}}}, **_ERRORS}


class _Api(FastAPI):
    """Describes the chunks of streams too, which no route returns as a body."""

    def openapi(self) -> dict[str, Any]:
        schema = super().openapi()
        chunks = [(protocol.ChatCompletionChunk, "serialization")]
        _, found = models_json_schema(chunks, ref_template=_REF)  # type: ignore[arg-type]  # it says list, not sequence
        schema["components"]["schemas"] = found["$defs"] | schema["components"]["schemas"]
        return schema


def create_app(
    service: Service,
    limits: Limits,
    keys: KeyRing | None = None,
    read_metrics: Callable[[], Awaitable[str]] | None = None,
) -> FastAPI:
    """The application.

    Args:
        keys: None: anybody may ask.
        read_metrics: the page of /metrics; None: there is none.
    """
    app = _Api(title="CLLM", description="OpenAI-compatible API of consistency large language models.")
    app.include_router(_api(service), dependencies=[Depends(HTTPBearer(auto_error=False))])
    app.include_router(_operations(read_metrics))
    app.mount("/page", StaticFiles(directory=_PAGE))
    _handle_errors(app, service)
    app.add_middleware(BodyLimit, limits=limits)
    if keys is not None:
        app.add_middleware(KeyCheck, keys=keys)
    app.add_middleware(RequestLog)
    return app


def _api(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1")
    created = protocol.now()

    text_responses = _streams(protocol.Completion, protocol.Completion)

    @router.post("/completions", response_model=None, responses=text_responses)
    async def complete(body: protocol.CompletionRequest, request: Request) -> Response:
        return await service.complete(body, request.state)

    chat_responses = _streams(protocol.ChatCompletion, protocol.ChatCompletionChunk)

    @router.post("/chat/completions", response_model=None, responses=chat_responses)
    async def chat(body: protocol.ChatRequest, request: Request) -> Response:
        return await service.chat(body, request.state)

    @router.get("/models", responses=_ERRORS)
    async def models() -> protocol.ModelList:
        return protocol.ModelList(data=[protocol.ModelCard(id=name, created=created) for name in service.models])

    return router


def _operations(read_metrics: Callable[[], Awaitable[str]] | None) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> protocol.Health:
        return protocol.Health()

    @router.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(_PAGE / "index.html")

    if read_metrics is not None:

        @router.get("/metrics", response_class=PlainTextResponse, responses=_ERRORS)
        async def metrics() -> str:
            return await read_metrics()

    return router


def _handle_errors(app: FastAPI, service: Service) -> None:
    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return error_response(_from_validation(error))

    async def refused(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        response = error_response(ApiError(error.status_code, str(error.detail)))
        response.headers.update(error.headers or {})
        return response

    async def failed(request: Request, error: Exception) -> JSONResponse:
        return error_response(service.api_error(error, request.state.request_id))

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, refused)
    for kind in (ApiError, ValueError, RuntimeError):
        app.add_exception_handler(kind, failed)
    app.add_exception_handler(Exception, failed)


def _from_validation(error: RequestValidationError) -> ApiError:
    """One line on the first wrong field; values are not repeated, for they may be long or secret."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return ApiError(status.HTTP_400_BAD_REQUEST, f"the body is no JSON: {first.get('ctx', {}).get('error', '')}")
    name = ".".join(place)
    if first["type"] == "extra_forbidden":
        message = f"{name}: this option is not supported"
        return ApiError(status.HTTP_400_BAD_REQUEST, message, code="unsupported_parameter", param=name)
    return ApiError(
        status.HTTP_400_BAD_REQUEST, f"{name or 'the body'}: {first['msg']}", code="invalid_value", param=name or None
    )
