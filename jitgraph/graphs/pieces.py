"""The pieces that shadow captures are made of, and how long one may take. Pure, no torch."""

from __future__ import annotations

import enum
from collections import deque

FIRST_GUESS_S = 1e-3
"""What a piece is expected to take before one of its kind was measured."""
PEAK_HALF_LIFE_S = 1.0
RECENT_PIECES = 8


class Piece(enum.Enum):
    """A piece of work that is not interrupted; the names are those under which failures are counted."""

    COLLECT = "collect"
    """Takes over what the helper thread has done."""
    DESTROY = "destroy"
    """Hands retired graphs to the helper thread."""
    STAGE = "stage"
    """Captures one stage."""
    END = "end"
    """Ends the capture and hands it to the helper thread."""
    WARM_UP = "warm up"
    """Runs one piece of a step that has never run."""
    BEGIN = "begin"
    """Chooses a key, evicts for it, opens its capture."""


class Expected:
    """How long the next piece of a kind may take: the recent maximum, slowly forgotten.

    The peak halves with every ``PEAK_HALF_LIFE_S``, so that one long pause does not keep pieces out for good; it does
    not fall below the shortest of the last eight.
    """

    def __init__(self, now: float) -> None:
        self._peak = FIRST_GUESS_S
        self._at = now
        self._recent: deque[float] = deque(maxlen=RECENT_PIECES)

    def duration(self, now: float) -> float:
        """Seconds to allow for the next piece."""
        faded: float = self._peak * 0.5 ** ((now - self._at) / PEAK_HALF_LIFE_S)
        return max(faded, min(self._recent)) if len(self._recent) == RECENT_PIECES else faded

    def add(self, duration: float, now: float) -> None:
        """A piece took ``duration``. The first one takes the place of the guess."""
        if not self._recent or duration >= self.duration(now):
            self._peak, self._at = duration, now
        self._recent.append(duration)
