"""What can go wrong between a client and its engine process. No torch; any thread."""

from __future__ import annotations

from jitgraph.errors import CapacityError, JitgraphError, RequestError
from jitgraph.ipc.messages import Refused


class EngineGone(JitgraphError):
    """The engine process has ended, hangs, or cannot be reached; ``reason`` is one sentence."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class RequestRefused(JitgraphError):
    """A request that the engine did not run.

    ``kind`` is one of ``request``, ``capacity``, ``overloaded``, ``draining``, ``deadline`` (it was not done in the
    time it was given, and may have been begun) and ``internal``; ``retry_after_s`` says when it may be tried again, 0
    where that is of no use.
    """

    def __init__(self, kind: str, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.retry_after_s = retry_after_s


def refusal(record: Refused) -> RequestRefused:
    """What the engine's record says, as an exception."""
    return RequestRefused(record.kind, record.message, record.retry_after_s)


def user_error(error: RequestRefused) -> JitgraphError:
    """The error that ``LLM`` raises for the same: a bad request is a ``RequestError``, one that can never fit a
    ``CapacityError``; what only a shared engine can say stays what it is."""
    if error.kind == "request":
        return RequestError(error.message)
    if error.kind == "capacity":
        return CapacityError(error.message)
    return error
