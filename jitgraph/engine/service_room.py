"""Room for large answers: the log-probabilities of a prompt go out in one record, which its client may not read soon.

Pure. A request whose answer begins with such a record begins only when there is room for it in what its client may
leave unread; until then it waits, and so none of a crowd of them has to be given up. Whoever reads has room again.
"""

from __future__ import annotations

from collections.abc import Hashable

from jitgraph.errors import RequestError
from jitgraph.ipc.frames import MAX_FRAME_BYTES

_TOKEN_BYTES = 18
"""At most, of one token's entry in msgpack: its own array, the id, the log-probability, the array of alternatives."""
_TOP_BYTES = 15
"""At most, of one alternative."""
_BESIDES_BYTES = 2**16
"""Everything else in such a record, and what else may wait beside the largest one."""


def scores_bytes(tokens: int, alternatives: int) -> int:
    """Most bytes of a record with the log-probabilities of so many prompt tokens.

    Raises:
        RequestError: no frame would hold it.
    """
    each = _TOKEN_BYTES + _TOP_BYTES * alternatives
    most = (MAX_FRAME_BYTES - _BESIDES_BYTES) // each
    if tokens > most:
        raise RequestError(
            f"the log-probabilities of {tokens} prompt tokens with {alternatives} alternatives each are more than one "
            f"answer holds ({most} tokens): ask for fewer alternatives or a shorter prompt"
        )
    return tokens * each


class Room:
    """What is promised to each client. Sizes in bytes."""

    def __init__(self, most: int) -> None:
        """``most``: what a client may leave unread."""
        self._most = most
        self._promised: dict[Hashable, int] = {}
        self._of: dict[int, tuple[Hashable, int]] = {}

    def take(self, client: Hashable, identity: int, size: int, unread: int) -> bool:
        """Promises a request room for ``size`` beside the ``unread`` bytes of its client's; False, and nothing is
        promised, where there is not so much. A client with nothing unread and nothing promised always has room."""
        promised = self._promised.get(client, 0)
        if (promised or unread) and promised + unread + size > self._most:
            return False
        self._promised[client] = promised + size
        self._of[identity] = (client, size)
        return True

    def give_back(self, identity: int) -> None:
        """The record has gone out, or never will. May be called for any request."""
        client, size = self._of.pop(identity, (None, 0))
        if size:
            left = self._promised[client] - size
            if left:
                self._promised[client] = left
            else:
                del self._promised[client]
