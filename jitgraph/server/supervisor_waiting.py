"""Waiting for the first of several events. Event loop's thread, ``set_from_thread`` aside."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any


class Waiting:
    """Waits for the first of several events, again and again, without making a task each time."""

    def __init__(self, *events: asyncio.Event) -> None:
        self._tasks: list[asyncio.Future[Any]] = [asyncio.ensure_future(event.wait()) for event in events]

    async def first(self, timeout_s: float | None, *others: asyncio.Future[Any]) -> None:
        """Returns when an event is set, or one of the futures is done, or time has run out."""
        await asyncio.wait([*self._tasks, *others], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)

    async def __aenter__(self) -> Waiting:
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def set_from_thread(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    """Sets an event of a loop that runs in another thread, or has ended."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(event.set)
