"""Several threads wait for news out of one source: one of them reads, for everybody. No torch, no sockets.

A thread that waits reads the source itself unless another does; then it sleeps until its own news is there, or until
the reading is handed on to it, first come first served. So nobody waits for a lock that is held while somebody reads,
news wakes only whom it is for, and a single thread never switches.
"""

from __future__ import annotations

import threading
from collections.abc import Callable


class Mailbox:
    """What one thread waits for. ``news`` is set with each delivery; its owner clears it before looking."""

    __slots__ = ("news",)

    def __init__(self) -> None:
        self.news = False


class _Turn:
    """A thread that sleeps; ``reads`` says whether it wakes up as the reader."""

    __slots__ = ("lock", "reads", "thread")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.lock.acquire()
        self.reads = False
        self.thread = threading.get_ident()


class Handoff:
    """Lends one reader to many who wait."""

    def __init__(self, read: Callable[[], None]) -> None:
        """``read`` waits for something to come and calls ``deliver`` for whom it is; it may also return without."""
        self._read = read
        self._guard = threading.Lock()
        self._turns: dict[Mailbox, _Turn] = {}
        self._reader: int | None = None
        """Thread that reads. One that finds itself here was interrupted before it could hand on."""

    def deliver(self, mailbox: Mailbox) -> None:
        """There is news, which its owner can see already. Any thread."""
        with self._guard:
            mailbox.news = True
            turn = self._turns.pop(mailbox, None)
        if turn is not None:
            turn.lock.release()

    def wait(self, mailbox: Mailbox) -> None:
        """Returns once ``mailbox`` has news. What ``read`` raises comes out here, and somebody else reads on."""
        while not mailbox.news:
            if self._take_over(mailbox):
                try:
                    while not mailbox.news:
                        self._read()
                finally:
                    self._hand_on()

    def read_if_free(self, read: Callable[[], None]) -> bool:
        """Calls ``read`` if nobody reads; whether it did."""
        with self._guard:
            if self._reader is not None:
                return False
            self._reader = threading.get_ident()
        try:
            read()
        finally:
            self._hand_on()
        return True

    def _take_over(self, mailbox: Mailbox) -> bool:
        """Sleeps if another thread reads. Whether this one is the reader now; else it has news, or must look again."""
        with self._guard:
            if mailbox.news:
                return False
            if self._reader is None or self._reader == threading.get_ident():
                self._reader = threading.get_ident()
                return True
            turn = self._turns[mailbox] = _Turn()
        try:
            turn.lock.acquire()
        except BaseException:  # interrupted: leave the queue, or hand on what was just handed over
            with self._guard:
                if self._turns.get(mailbox) is turn:
                    del self._turns[mailbox]
            if turn.reads:
                self._hand_on()
            raise
        return turn.reads

    def _hand_on(self) -> None:
        with self._guard:
            for mailbox in self._turns:
                turn = self._turns.pop(mailbox)
                turn.reads, self._reader = True, turn.thread
                break
            else:
                self._reader = None
                return
        turn.lock.release()
