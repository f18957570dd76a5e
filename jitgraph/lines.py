"""Lines for people on standard error, from threads that must not wait for whoever reads them.

A pipe that nobody reads takes some 64 KiB and then blocks its writer. So a thread of its own writes, while there is
anything; what comes meanwhile waits, up to a limit, and further lines are dropped, counted, and told of once somebody
reads again. Any thread; no torch.
"""

from __future__ import annotations

import logging
import os
import select
import threading
from collections import deque
from contextlib import suppress

MAX_WAITING = 2000
"""Lines that may wait."""
_STDERR = 2


class LineWriter:
    """Writes lines to a descriptor, by default standard error. Call it with a line; that never waits."""

    def __init__(self, descriptor: int = _STDERR, most_waiting: int = MAX_WAITING) -> None:
        self._descriptor = descriptor
        self._most = most_waiting
        self._guard = threading.Condition()
        self._waiting: deque[str] = deque()
        self._writing = False
        self._untold = 0
        self.dropped = 0
        """Lines that could not be written."""

    def __call__(self, line: str) -> None:
        """Hands a line over."""
        with self._guard:
            if len(self._waiting) >= self._most:
                self.dropped += 1
                self._untold += 1
                return
            self._waiting.append(line)
            if not self._writing:
                self._writing = True
                threading.Thread(target=self._run, name="jitgraph-lines", daemon=True).start()

    def flush(self, timeout_s: float) -> bool:
        """Waits until everything is written, at most so long; whether it is."""
        with self._guard:
            return self._guard.wait_for(lambda: not self._writing, timeout_s)

    def _run(self) -> None:
        """The writing thread, until nothing waits."""
        while True:
            with self._guard:
                if not self._waiting:
                    self._writing = False
                    self._guard.notify_all()
                    return
                lines, lost = list(self._waiting), self._untold
                self._waiting.clear()
                self._untold = 0
            if lost:
                lines.append(f"({lost} lines are missing here: nobody read them in time)")
            for line in lines:  # each in one piece: other threads and processes write there too
                if not self._write(f"{line}\n".encode("utf-8", "backslashreplace")):
                    self.dropped += 1

    def _write(self, data: bytes) -> bool:
        with suppress(OSError):  # nobody will ever read it
            while data:
                try:
                    data = data[os.write(self._descriptor, data) :]
                except BlockingIOError:  # whoever gave it to us does not want it to wait
                    poller = select.poll()
                    poller.register(self._descriptor, select.POLLOUT)
                    poller.poll()
            return True
        return False


class LineHandler(logging.Handler):
    """Log records as lines."""

    def __init__(self, write: LineWriter) -> None:
        super().__init__(logging.WARNING)
        self._write = write
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Hands a record over."""
        try:
            self._write(self.format(record))
        except Exception:
            self.handleError(record)
