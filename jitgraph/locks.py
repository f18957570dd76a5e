"""A lock that serves those who wait in the order in which they came. No torch."""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType


class FairLock:
    """A mutual exclusion lock, first come first served, for use in a ``with`` statement; not re-entrant.

    Python's own lock may be taken again at once by the thread that released it. A thread that steps an engine in a loop
    would then keep out for long another one that only wants to hand over a request.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._guard = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()

    def __enter__(self) -> FairLock:
        # Mostly nobody else is there; a thread that comes while others wait joins their queue.
        if not self._waiting and self._lock.acquire(blocking=False):
            return self
        with self._guard:
            if not self._waiting and self._lock.acquire(blocking=False):
                return self
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        try:
            turn.acquire()
        except BaseException:  # interrupted while waiting: leave the queue, or hand on what was just handed over
            with self._guard:
                if turn in self._waiting:
                    self._waiting.remove(turn)
                else:
                    self._hand_on()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._guard:
            self._hand_on()

    def _hand_on(self) -> None:
        """The lock itself stays taken while it goes from hand to hand."""
        if self._waiting:
            self._waiting.popleft().release()
        else:
            self._lock.release()
