"""Keeps Python's garbage collector off the token path of the front-end: it runs when no stream does.

Event loop's thread. What lives after the start is frozen, so that no collection looks at it again. Where the server is
never idle, the youngest objects are collected all the same before they become many; that pause is short, and counted.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

LOOK_EVERY_S = 0.25
MOST_YOUNG = 50_000
"""More container objects than this made since the last look are collected even while streams run."""
WORTH_WHILE = 2_000
"""Fewer are left for later."""
FULL_EVERY_S = 30.0
"""Pause between two collections of everything, when idle."""


@dataclass
class Pauses:
    """What collections have cost."""

    count: int = 0
    seconds: float = 0.0
    longest_s: float = 0.0
    while_busy: int = 0
    """Those during which streams ran."""


class IdleCollector:
    """Collects garbage when ``busy`` says that nobody waits."""

    def __init__(
        self,
        busy: Callable[[], bool],
        on_pause: Callable[[float], None] = lambda seconds: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """``on_pause`` hears the length of each collection, in seconds."""
        self._busy = busy
        self._on_pause = on_pause
        self._clock = clock
        self._full_at = clock()
        self._was_on = gc.isenabled()
        self.pauses = Pauses()

    def freeze(self) -> None:
        """Start-up is over: what lives now stays, and nothing is collected unasked from here on."""
        gc.collect()
        gc.freeze()
        gc.disable()
        self._full_at = self._clock()

    def look(self) -> None:
        """Collects if now is a good time and it is worth while."""
        young, busy, now = gc.get_count()[0], self._busy(), self._clock()
        if busy:
            if young > MOST_YOUNG:
                self._collect(0, busy=True)
        elif now - self._full_at >= FULL_EVERY_S and young > 0:
            self._full_at = now
            self._collect(2, busy=False)
        elif young > WORTH_WHILE:
            self._collect(1, busy=False)

    async def run(self) -> None:
        """Looks again and again, until cancelled; then the collector is as it was."""
        try:
            while True:
                await asyncio.sleep(LOOK_EVERY_S)
                self.look()
        finally:
            gc.unfreeze()
            if self._was_on:
                gc.enable()

    def _collect(self, generation: int, busy: bool) -> None:
        begun = self._clock()
        gc.collect(generation)
        spent = self._clock() - begun
        pauses = self.pauses
        pauses.count += 1
        pauses.seconds += spent
        pauses.longest_s = max(pauses.longest_s, spent)
        pauses.while_busy += busy
        self._on_pause(spent)
