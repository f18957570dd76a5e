"""Forbidding compilation where a pause would hurt: after an engine is ready.

The ban belongs to the thread (or task) that opened the block. It is looked at only when a launch finds no kernel loaded
for it, so it costs an ordinary launch nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from jitgraph.errors import CompileError

_BAN: ContextVar[str | None] = ContextVar("jitgraph_compile_ban", default=None)


@contextmanager
def forbid_compiles(reason: str) -> Iterator[None]:
    """Inside the block, making a specialisation ready raises a ``CompileError`` that says ``reason``."""
    token = _BAN.set(reason)
    try:
        yield
    finally:
        _BAN.reset(token)


def require_compiles_allowed(what: str) -> None:
    """Called before ``what`` is compiled, or loaded from a cache.

    Raises:
        CompileError: inside a ``forbid_compiles`` block.
    """
    reason = _BAN.get()
    if reason is not None:
        raise CompileError(
            f"a kernel specialisation was not compiled before ready: {what} ({reason}); this is a bug of jitgraph that "
            "is worth a report, and without strict it is a pause that stats() counts"
        )
