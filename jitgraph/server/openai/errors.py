"""Errors as clients of OpenAI's interface expect them: always ``message``, ``type``, ``param`` and ``code``.

Pure. Statuses and codes: 400 ``invalid_request_error``, 401 ``invalid_api_key``, 404 ``model_not_found``, 422
``deadline_exceeded``, 429 with ``Retry-After`` where the queue is full, 503 with ``Retry-After`` while no engine takes
requests, 500 for defects.
"""

from __future__ import annotations

import math
from dataclasses import fields

import msgspec

from jitgraph.errors import CheckpointError, RequestError
from jitgraph.types import SamplingParams

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    422: "timeout_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    500: "server_error",
    503: "service_unavailable_error",
}
"""The error's ``type`` for each status."""


class ErrorBody(msgspec.Struct, frozen=True):
    """What is wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(msgspec.Struct, frozen=True):
    """The body of every answer that is an error."""

    error: ErrorBody


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: HTTP status.
        message: one sentence for a person.
        param: the field at fault, as ``messages[0].content``.
        code: what programs look at.
        retry_after_s: when asking again may help.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = ErrorBody(message, TYPES.get(status, "server_error"), param, code)
        self.retry_after_s = retry_after_s
        self.challenge = b"Bearer"
        """With 401: how a key may be sent, as ``WWW-Authenticate`` says it."""

    @property
    def name(self) -> str:
        """Its code, else its type: for logs and metrics."""
        return self.body.code or self.body.type

    def encode(self) -> bytes:
        """The answer's body."""
        return msgspec.json.encode(ErrorResponse(self.body))

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """Headers that go with it."""
        found: list[tuple[bytes, bytes]] = []
        if self.retry_after_s is not None:
            found.append((b"retry-after", b"%d" % max(1, math.ceil(self.retry_after_s))))
        if self.status == 401:
            found.append((b"www-authenticate", self.challenge))
        return found


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that is wrong in itself."""
    return ApiError(400, message, param, code)


def unsupported(param: str, why: str = "") -> ApiError:
    """A field, or a value of it, that this server does not do."""
    return bad_request(f"{param} is not supported by this server{f': {why}' if why else ''}", param, "unsupported")


def unavailable(retry_after_s: float, why: str) -> ApiError:
    """No engine takes requests now."""
    return ApiError(503, why, None, "engine_unavailable", retry_after_s)


def too_long(limit: int | None, why: str, param: str | None, less: str = "") -> ApiError:
    """A prompt that does not fit into the context of ``limit`` tokens, in the words that clients look for."""
    message = f"This model's maximum context length is {limit} tokens, but {why}: send a shorter prompt{less}"
    return bad_request(message, param, "context_length_exceeded")


def engine_lost(retry_after_s: float, comes_back: bool = True) -> ApiError:
    """The engine ended while it worked on the request; ``comes_back``: this server will have another one."""
    then = "send the request again, it is being restarted" if comes_back else "the server is shutting down"
    return ApiError(503, f"the engine ended while it was answering: {then}", None, "engine_lost", retry_after_s)


def refused(kind: str, message: str, retry_after_s: float) -> ApiError:
    """What the engine's refusal means to an HTTP client."""
    if kind in ("request", "capacity"):
        return bad_request(message, param_of(message), "invalid_value" if kind == "request" else "capacity_exceeded")
    if kind == "overloaded":
        return ApiError(429, message, None, "rate_limit_exceeded", retry_after_s or 1.0)
    if kind == "deadline":
        # No 408 or 504: clients send such requests again by themselves, and each would take as long.
        return ApiError(422, message, None, "deadline_exceeded")
    if kind == "draining":
        return unavailable(retry_after_s or 1.0, message)
    return ApiError(500, message, None, "engine_error")


def internal() -> ApiError:
    """A defect of this server; what happened stands in its log, not in the answer."""
    return ApiError(500, "the server failed to answer this request; its log says why", None, "internal_error")


def from_user_error(error: Exception, param: str | None = None) -> ApiError:
    """A typed error of the library as an answer: a request's fault is 400, a checkpoint's is 500."""
    message = str(error)
    if isinstance(error, CheckpointError) and not isinstance(error, RequestError):
        return ApiError(500, message, param, "checkpoint_error")
    return bad_request(message, param or param_of(message), "invalid_value")


_FIELDS = frozenset(field.name for field in fields(SamplingParams)) | {"prompt"}


def param_of(message: str) -> str | None:
    """The field that a sentence of the library's own errors is about, where one of its first words names it."""
    return next((word for word in message.replace(",", " ").split()[:4] if word in _FIELDS), None)
