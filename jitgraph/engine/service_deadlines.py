"""When requests must be done. Pure; times are ``time.monotonic`` seconds."""

from __future__ import annotations

import heapq
import math
from collections.abc import Container, Iterator

_MOST_ENDED = 256
"""So many requests that have ended may stand among the deadlines before they are sorted out."""


class Deadlines:
    """The deadlines of requests that may have ended meanwhile."""

    def __init__(self, live: Container[int]) -> None:
        """``live``: the identities of those that have not."""
        self._live = live
        self._heap: list[tuple[float, int, float]] = []
        self._sort_out_at = _MOST_ENDED

    def __len__(self) -> int:
        """How many are kept, some that have ended included."""
        return len(self._heap)

    @property
    def next_s(self) -> float:
        """When ``due`` may have something; infinite where nothing has a limit."""
        return self._heap[0][0] if self._heap else math.inf

    def add(self, now_s: float, identity: int, timeout_s: float) -> None:
        """Notes when a request must be done."""
        heap = self._heap
        if len(heap) > self._sort_out_at:
            heap[:] = [one for one in heap if one[1] in self._live]
            heapq.heapify(heap)
            self._sort_out_at = _MOST_ENDED + 2 * len(heap)
        heapq.heappush(heap, (now_s + timeout_s, identity, timeout_s))

    def due(self, now_s: float) -> Iterator[tuple[int, float]]:
        """The live requests whose time is over, each once, with the seconds that it was given."""
        while self._heap and self._heap[0][0] <= now_s:
            _, identity, timeout_s = heapq.heappop(self._heap)
            if identity in self._live:
                yield identity, timeout_s
