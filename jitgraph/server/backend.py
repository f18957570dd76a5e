"""What the HTTP server needs of whoever runs the engine, as small protocols.

``Supervisor`` and ``EngineClient`` satisfy the protocols; tests use fakes. Event loop's thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from jitgraph.ipc.messages import Beat, EngineFacts, Grammar, Tokens
from jitgraph.types import SamplingParams


class TokenSource(Protocol):
    """One request at the engine: an asynchronous iterator whose last ``Tokens`` has a finish reason."""

    def __aiter__(self) -> TokenSource: ...

    async def __anext__(self) -> Tokens: ...

    def cancel(self) -> None:
        """Ends the request; may be called more than once."""


class EngineLink(Protocol):
    """A connection to one engine that is ready."""

    @property
    def facts(self) -> EngineFacts:
        """What the engine says of itself and its model."""

    @property
    def last_beat(self) -> Beat | None:
        """The engine's latest sign of life."""

    @property
    def last_seen_ns(self) -> int:
        """``perf_counter_ns`` when anything last came from the engine."""

    @property
    def gone(self) -> str | None:
        """Why the connection has ended; None while it has not."""

    def submit(
        self,
        ids: Sequence[int],
        params: SamplingParams,
        *,
        salt: str = "",
        prompt_logprobs: int | None = None,
        grammar: Grammar | None = None,
        timeout_s: float = 0.0,
    ) -> TokenSource:
        """Hands a request over; the engine ends it after ``timeout_s``, 0 never."""

    async def stats(self) -> dict[str, Any]:
        """Counters of the engine."""


class Backend(Protocol):
    """Whoever runs the engine."""

    @property
    def client(self) -> EngineLink | None:
        """The engine that takes requests now; None while there is none."""

    @property
    def state(self) -> str:
        """``starting``, ``ready``, ``restarting``, ``draining``, ``stopped`` or ``failed``."""

    @property
    def retry_after_s(self) -> float:
        """When it is worth asking again while there is no engine."""
