"""Who may hold how much of the queue. Pure.

Nobody is turned away while there is room. In a full queue a newcomer takes the place of the newest request of whoever
has the most waiting, if that party has at least two more waiting than the newcomer's own. So of *k* parties with
requests in a queue of *n*, the newcomer's included, none that has fewer than ``n // k`` waiting is turned away, and
none loses one that has no more than that. (Known from switches as longest queue drop.)
"""

from __future__ import annotations

from collections.abc import Hashable


class Shares:
    """The requests that wait, by the party that sent them. Identities grow with time."""

    def __init__(self) -> None:
        self._waiting: dict[Hashable, dict[int, None]] = {}
        self._party: dict[int, Hashable] = {}

    def add(self, party: Hashable, identity: int) -> None:
        """A request waits from now on."""
        self._waiting.setdefault(party, {})[identity] = None
        self._party[identity] = party

    def remove(self, identity: int) -> None:
        """It waits no more, or has ended. May be called for any request."""
        party = self._party.pop(identity, None)
        if identity in (theirs := self._waiting.get(party, {})):
            del theirs[identity]
            if not theirs:
                del self._waiting[party]

    def gives_way(self, newcomer: Hashable) -> int | None:
        """The request that makes room for one of ``newcomer`` in a full queue; None where the newcomer has to go."""
        if not self._waiting:
            return None
        party = max(self._waiting, key=lambda one: len(self._waiting[one]))
        theirs = self._waiting[party]
        if len(theirs) < len(self._waiting.get(newcomer, ())) + 2:
            return None
        return next(reversed(theirs))
