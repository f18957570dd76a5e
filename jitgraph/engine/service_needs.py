"""What the books of an engine process's requests need of others, and how much they take. No torch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jitgraph.engine.service_client import Client
from jitgraph.ipc.messages import Message
from jitgraph.types import Grammar, Request, SamplingParams


class RequestEngine(Protocol):
    """What requests need of an engine; ``Engine`` has it."""

    def fire(self, ids: tuple[int, ...], params: SamplingParams, salt: str) -> Any: ...

    def book(self, request: Request, shot: Any) -> None: ...

    def validate(self, request: Request) -> None: ...

    def enqueue(self, request: Request) -> None: ...

    def cancel(self, request_id: int) -> None: ...


class Sender(Protocol):
    """Who sends news; ``Hub`` does."""

    most_unsent: int

    def wake(self) -> None: ...

    def send(self, client: Client, record: Message) -> None: ...

    def send_owned(self, client: Client, frames: Sequence[tuple[Hashable, bytes]]) -> None: ...


class Compiling(Protocol):
    """A grammar on its way; ``grammar.Compilation`` is one."""

    @property
    def done(self) -> bool: ...

    def result(self) -> object: ...


class Grammars(Protocol):
    """Who compiles grammars; ``grammar.GrammarCompiler`` does."""

    def start(self, grammar: Grammar, on_done: Callable[[], None]) -> Compiling: ...


@dataclass(frozen=True)
class Limits:
    """How much is accepted."""

    max_streams: int
    max_queued: int
    """Requests that wait besides those that run; of more, some are refused as ``overloaded`` (``Shares``)."""
    max_model_len: int | None
    """Tokens of prompt and output together; None where there is no end."""
