"""Failures on the way from a client to an engine and back, and what the client is told of them.

`cllm.errors.InputError` is a refused request (400); everything else here is not the client's fault, or a matter of keys
and sizes.
"""

from fastapi import status


class ReplicaLostError(RuntimeError):
    """The replica died or its engine stopped; another one can go on."""


class OverloadedError(RuntimeError):
    """The queue of a model is full, or it has no replica at the moment; later it may work."""


class ReplicaFailedError(RuntimeError):
    """A defect of ours in a replica; its log holds the traceback."""


class ApiError(Exception):
    """An answer other than 200, in OpenAI's form.

    Args:
        status_code: of HTTP.
        message: one line for the client.
        code: a word for programs.
        param: the field of the request that is wrong.
        retry_after_s: when to try again.
    """

    def __init__(
        self,
        status_code: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status_code = status_code
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def kind(self) -> str:
        """OpenAI's `type` of an error."""
        if self.status_code == status.HTTP_401_UNAUTHORIZED:
            return "authentication_error"
        if self.status_code == status.HTTP_429_TOO_MANY_REQUESTS:
            return "rate_limit_error"
        return "invalid_request_error" if self.status_code < status.HTTP_500_INTERNAL_SERVER_ERROR else "server_error"

    def body(self) -> dict[str, dict[str, str | None]]:
        message = self.message.encode(errors="backslashreplace").decode()  # it may quote half a surrogate pair
        return {"error": {"message": message, "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
