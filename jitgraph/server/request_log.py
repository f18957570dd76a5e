"""The request log: one JSON line for each request, written by a thread of its own.

The event loop only puts the record into a queue. A disk that is slow, full or gone costs lines, never a request: what
cannot be written is dropped and counted, and writing goes on as soon as it works again. A file that was moved away
(logrotate) is made anew. No line holds a word of prompt or answer.
"""

from __future__ import annotations

import json
import os
import queue
import threading
from pathlib import Path

from jitgraph.errors import OutputError
from jitgraph.server.records import RequestRecord

MAX_WAITING = 10_000
"""Records that may wait for a slow disk before further ones are dropped."""

_STDERR = 2


def log_line(record: RequestRecord) -> bytes:
    """A record as one line of JSON, in ASCII: whatever a client put into its names, it can end no line and colour no
    terminal."""
    return json.dumps(record.as_document(), ensure_ascii=True, separators=(",", ":")).encode("ascii") + b"\n"


class RequestLog:
    """Appends to a file, or to standard error for ``-``. Call it with a record, from any thread."""

    def __init__(self, target: str | os.PathLike[str], most_waiting: int = MAX_WAITING) -> None:
        """Begins at once.

        Raises:
            OutputError: the file cannot be written.
        """
        self._path = None if os.fspath(target) == "-" else Path(target)
        self._most = most_waiting
        self._queue: queue.SimpleQueue[RequestRecord | None] = queue.SimpleQueue()
        self._file = -1
        self._torn = False
        self._unqueued = 0
        self._unwritten = 0
        try:
            self._open()
        except OSError as error:
            raise OutputError(
                f"the request log {self._path} cannot be written ({error.strerror}): name another file, or - for "
                "standard error"
            ) from error
        self._thread = threading.Thread(target=self._run, name="jitgraph-request-log", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Lines that could not be written."""
        return self._unqueued + self._unwritten

    def __call__(self, record: RequestRecord) -> None:
        """Hands a finished record over; it must not change any more. Never waits."""
        if self._queue.qsize() >= self._most:
            self._unqueued += 1
            return
        self._queue.put(record)

    def close(self, timeout_s: float = 2.0) -> None:
        """Writes what waits, for at most that long."""
        self._queue.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (record := self._queue.get()) is not None:
            try:
                self._write(log_line(record))
            except Exception:  # mostly the disk; whatever it is, it must not end the log
                self._unwritten += 1
                self._close_file()
        self._close_file()

    def _write(self, line: bytes) -> None:
        """A whole line, or an error.

        Raises:
            OSError: it could not be written whole.
        """
        self._open()
        data = b"\n" + line if self._torn else line
        written = os.write(self._file, data)
        self._torn = written < len(data)
        if self._torn:  # the next line begins with a line's end, so that one line alone is lost
            raise OSError("the disk took part of a line")

    def _open(self) -> None:
        """Opens the file if it is not open, or no longer the one under its name."""
        if self._path is None:
            self._file = _STDERR
            return
        if self._file >= 0:
            try:
                here, there = os.fstat(self._file), os.stat(self._path)
                if (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino):
                    return
            except FileNotFoundError:
                pass
            self._close_file()
            self._torn = False
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK
        self._file = os.open(self._path, flags, 0o600)

    def _close_file(self) -> None:
        if self._path is not None and self._file >= 0:
            os.close(self._file)
        self._file = -1
