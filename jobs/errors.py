"""Finding the user's mistake inside what Ray raises around it."""

import re
from collections.abc import Iterator

from cllm.artifacts import is_disk_full
from cllm.errors import InputError

# Ray Data functions and actor constructors report their exception as the text of its traceback only.
_IN_TRACEBACK = re.compile(rf"^\s*{InputError.__module__}\.{InputError.__qualname__}: (.+)$", re.MULTILINE)


def input_error_in(error: BaseException) -> str | None:
    """The one-line message if bad input or a full disk lies behind `error`; None if it is a defect of ours."""
    for found in _unwrap(error):
        if isinstance(found, InputError):
            return _one_line(str(found))
        if is_disk_full(found):
            filename = getattr(found, "filename", None)
            return f"no space left on the disk{f': {filename}' if filename else ''}"
        if messages := _IN_TRACEBACK.findall(str(found)):
            return _one_line(messages[-1])
    return None


def _unwrap(error: BaseException) -> Iterator[BaseException]:
    """The exceptions that Ray wrapped into `error`, innermost first.

    Only what Ray wraps: an InputError that code of ours caught before failing otherwise does not excuse the failure.
    Innermost first, because a RayTaskError is also an instance of its cause's class, with a traceback as its message.
    """
    inner = [
        getattr(error, "cause", None),  # RayTaskError
        getattr(error, "controller_failure", None),  # Ray Train's ControllerError
        *getattr(error, "worker_failures", {}).values(),  # Ray Train's WorkerGroupError
    ]
    for wrapped in inner:
        if isinstance(wrapped, BaseException):
            yield from _unwrap(wrapped)
    yield error


def _one_line(message: str) -> str:
    return " ".join(message.split())
