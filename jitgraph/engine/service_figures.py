"""What the engine process counts besides the engine's own figures. Engine's thread; a count costs a microsecond at
most. No torch.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from jitgraph.metrics import PAUSE_EDGES_S, GcWatch, Histogram

_WEIGHT = 0.2
_SHORTEST_S, _LONGEST_S = 0.1, 60.0


class Figures:
    """One process's, since ready."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        """Requests that have ended, by finish reason, ``abandoned`` (the client went) or ``refused_`` and the kind."""
        self.failures: Counter[str] = Counter()
        """Errors in the engine's loop, by type; after each it went on, or ended."""
        self.launched = Histogram(PAUSE_EDGES_S)
        """Seconds from reading a request to the launch of its first step."""
        self.launched_longest_s = 0.0
        self.pauses = Histogram(PAUSE_EDGES_S)
        """Garbage collections, in seconds."""
        self.pauses_longest_s = 0.0
        self.watch = GcWatch(self._pause)
        self._request_s = 1.0

    def begun(self, received_ns: int, launched_ns: int) -> None:
        """A request's first step was launched."""
        seconds = (launched_ns - received_ns) / 1e9
        self.launched.observe(seconds)
        if seconds > self.launched_longest_s:
            self.launched_longest_s = seconds

    def ended(self, outcome: str, seconds: float) -> None:
        """A request has run to its end."""
        self.outcomes[outcome] += 1
        self._request_s += _WEIGHT * (seconds - self._request_s)

    def retry_after_s(self, ahead: int, streams: int) -> float:
        """When a request that finds ``ahead`` others waiting may be tried again: once they can have begun."""
        return min(_LONGEST_S, max(_SHORTEST_S, self._request_s * (ahead + 1) / streams))

    def _pause(self, seconds: float) -> None:
        self.pauses.observe(seconds)
        self.pauses_longest_s = max(self.pauses_longest_s, seconds)

    def values(self) -> dict[str, Any]:
        """Numbers, and dicts of numbers by label, for ``Stats``."""
        return {
            "requests": dict(self.outcomes),
            "engine_errors": dict(self.failures),
            "received_to_launched_seconds": self.launched.as_values(),
            "received_to_launched_count": self.launched.count,
            "received_to_launched_longest_seconds": self.launched_longest_s,
            "gc_pauses": self.pauses.as_values(),
            "gc_pause_count": self.pauses.count,
            "gc_pause_seconds": self.pauses.sum,
            "gc_pause_longest_seconds": self.pauses_longest_s,
        }
