"""What waits to be sent over one connection, piece by piece in the order in which it was given. Pure; one thread.

A piece is one or more whole frames. It may have an owner, such as the request that it answers, so that of a reader who
falls behind the largest owner's pieces can be taken back instead of everybody's. Never taken back is a piece that has
begun: the other side waits for its rest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable

Owner = Hashable | None


class Outbox:
    """One connection's. All sizes in bytes."""

    def __init__(self) -> None:
        self._pieces: deque[tuple[Owner, bytes]] = deque()
        self._gone = 0
        """Of the first piece, what is gone."""
        self._begun = False
        """Whether anything of the first piece is gone, in an earlier life included."""
        self._of: dict[Hashable, int] = {}
        """What could be taken back of each owner."""
        self.size = 0
        """All that waits."""
        self.owned = 0
        """What could be taken back, of all owners."""
        self.loose = 0
        """What has no owner."""

    def add(self, owner: Owner, data: bytes, begun: bool = False) -> None:
        """Puts a piece behind the others. ``begun``: it is the rest of one that has gone in part, and nothing waits."""
        assert not (begun and self._pieces), "only the first piece can have begun"
        if not data:
            return
        self._pieces.append((owner, data))
        self.size += len(data)
        self._begun = self._begun or begun
        if owner is None or not begun:
            self._count(owner, len(data))

    def _count(self, owner: Owner, size: int) -> None:
        if owner is None:
            self.loose += size
            return
        self.owned += size
        left = self._of.get(owner, 0) + size
        if left:
            self._of[owner] = left
        else:
            del self._of[owner]

    def front(self, most: int) -> bytes:
        """The next bytes to send, at most so many; empty where nothing waits."""
        if not self._pieces:
            return b""
        data = self._pieces[0][1]
        if self._gone or len(data) > most:
            return data[self._gone : self._gone + most]
        parts, size = [], 0
        for _, data in self._pieces:
            if size + len(data) > most:
                break
            parts.append(data)
            size += len(data)
        return b"".join(parts)

    def sent(self, count: int) -> None:
        """So many bytes of ``front`` are gone."""
        self.size -= count
        while count:
            owner, data = self._pieces[0]
            step = min(count, len(data) - self._gone)
            if owner is None:
                self.loose -= step
            elif not self._begun:
                self._count(owner, -len(data))
            self._begun = True
            self._gone += step
            count -= step
            if self._gone == len(data):
                self._pieces.popleft()
                self._gone, self._begun = 0, False

    def heaviest(self) -> Hashable | None:
        """Whose pieces that could be taken back are the most; None where there are none."""
        return max(self._of, key=self._of.__getitem__) if self._of else None

    def take_back(self, owner: Hashable) -> int:
        """Forgets an owner's pieces that have not begun; how many bytes that were."""
        size = self._of.get(owner, 0)
        if size:
            self._keep(lambda theirs: theirs != owner)
        return size

    def take_all_back(self) -> None:
        """Forgets everything but a piece that has begun."""
        self._keep(lambda _: False)

    def _keep(self, wanted: Callable[[Owner], bool]) -> None:
        first = self._begun
        kept: deque[tuple[Owner, bytes]] = deque()
        for owner, data in self._pieces:
            if first or wanted(owner):
                kept.append((owner, data))
            else:
                self.size -= len(data)
                self._count(owner, -len(data))
            first = False
        self._pieces = kept

    def clear(self) -> None:
        """Forgets everything."""
        self._pieces.clear()
        self._of.clear()
        self._gone, self._begun = 0, False
        self.size = self.owned = self.loose = 0
