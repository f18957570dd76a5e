"""How much a graph is asked for, and whether the store is thrashing. Pure; counts requests, knows no clock.

A *request* is one prompt step that the dispatcher placed. Demand fades by half with each ``HALF_LIFE_REQUESTS``.
"""

from __future__ import annotations

import math
from collections import deque

HALF_LIFE_REQUESTS = 200
"""Requests after which one asking counts half."""
COLD = -math.inf
"""Heat of what nobody has asked for."""

THRASH_WINDOW_REQUESTS = 1000
THRASH_LIMIT = 20
"""Recaptures within the window above which the store holds back."""


def heated(heat: float, request: int) -> float:
    """The heat after one more asking, at request number ``request``.

    Heat is the base-2 logarithm of the sum of ``2 ** (r / half-life)`` over the requests ``r`` that asked. Fading
    scales all sums alike, so heats compare without a look at the present: a difference of 1 is twice the demand.
    """
    new = request / HALF_LIFE_REQUESTS
    if heat == COLD:
        return new
    larger, smaller = max(heat, new), min(heat, new)
    return larger + math.log2(1 + 2 ** (smaller - larger))


def demand(heat: float, request: int) -> float:
    """Askings, each faded by its age: what ``heat`` means at request number ``request``."""
    return float(2 ** (heat - request / HALF_LIFE_REQUESTS))


class Thrash:
    """Recaptures (captures of what was evicted before) among the last 1,000 requests, and what they demand."""

    def __init__(self) -> None:
        self._recaptures: deque[int] = deque()
        self.over = False
        """Whether the last ``update`` found the rate over ``THRASH_LIMIT``."""

    def add(self, request: int) -> None:
        """One more recapture, at request number ``request``."""
        self._recaptures.append(request)

    def update(self, request: int) -> bool:
        """Forgets what has left the window; True where the rate has just crossed the limit, either way."""
        while self._recaptures and self._recaptures[0] <= request - THRASH_WINDOW_REQUESTS:
            self._recaptures.popleft()
        before, self.over = self.over, self.rate > THRASH_LIMIT
        return before != self.over

    @property
    def rate(self) -> int:
        """Recaptures per 1,000 requests."""
        return len(self._recaptures)

    @property
    def margin(self) -> float:
        """Heat by which a newcomer must exceed what it displaces: 0 while calm, then more the worse it gets."""
        return self.rate / THRASH_LIMIT if self.over else 0.0
