"""A thread that lends its time to whoever has work for when nobody waits. No torch.

It asks for one short piece of work after another and stops asking while there is none. The work takes its owner's lock
for each piece, so a request waits for one piece at most.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable

GRACE_S = 2e-3
"""How long it must have been quiet before work begins: the next request often comes at once."""
LOOK_AGAIN_S = 5.0
"""How often it looks for work unasked: what failed is tried again after a while."""


class IdleThread:
    """Calls ``work`` while it returns True, each time ``wake`` has been called."""

    def __init__(self, work: Callable[[], bool]) -> None:
        """``work`` does one piece and says whether there was any; a bound method is held weakly, so that its owner can
        go."""
        self._work: Callable[[], Callable[[], bool] | None] = (
            weakref.WeakMethod(work) if hasattr(work, "__self__") else lambda: work
        )
        self._awake = threading.Event()
        self._stopped = False
        self._thread: threading.Thread | None = None

    def wake(self) -> None:
        """It is quiet now. Cheap: an event is set; the first call starts the thread."""
        if self._thread is None and not self._stopped:
            self._thread = threading.Thread(target=self._run, name="jitgraph-idle", daemon=True)
            self._thread.start()
        self._awake.set()

    def stop(self) -> None:
        """Ends the thread after the piece it is at; does not wait for it."""
        self._stopped = True
        self._awake.set()

    def _run(self) -> None:
        while not self._stopped:
            self._awake.wait(timeout=LOOK_AGAIN_S)
            self._awake.clear()
            time.sleep(GRACE_S)
            while not self._stopped and not self._awake.is_set() and self._do_piece():
                time.sleep(0)  # lets a thread that wants the lock, or the interpreter, have it

    def _do_piece(self) -> bool:
        """One piece of work; whether there is more. In a frame of its own: a waiting thread keeps no owner alive."""
        work = self._work()
        if work is None:
            self._stopped = True  # its owner is gone
            return False
        try:
            return work()
        except Exception:  # whoever asks for the next token meets it; this thread looks again later
            return False
