"""A socket that accepts clients of this user, and takes its file away when it closes. One thread at a time."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from jitgraph.ipc.frames import MAX_GREETING_BYTES, Framer
from jitgraph.ipc.messages import FromClient
from jitgraph.ipc.sockets import MAX_UNSENT_BYTES, Connection, check_peer, listen


class Listener:
    """An engine's end of a path.

    Raises:
        ConfigError: as ``listen``.
    """

    def __init__(self, path: Path) -> None:
        self._socket = listen(path)
        self._path = path
        self._inode = path.lstat().st_ino

    def fileno(self) -> int:
        """For pollers."""
        return self._socket.fileno()

    def accept(self, most_unsent: int = MAX_UNSENT_BYTES) -> tuple[Connection[FromClient], int] | None:
        """The next client's connection and process id, without waiting; None where nobody waits. Processes of other
        users are turned away. Only small frames are read until it is ``greeted``: who says nothing holds no memory.

        Raises:
            OSError: this process has too many open files.
        """
        while True:
            try:
                connected, _ = self._socket.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return None
            try:
                pid = check_peer(connected)
            except OSError:  # PermissionError is one
                connected.close()
                continue
            return Connection(connected, Framer(FromClient, MAX_GREETING_BYTES), most_unsent), pid

    def remove(self) -> None:
        """Takes the file away, unless another process has put its own there; nobody connects any more. May be called
        more than once, and from a signal's handler."""
        with suppress(OSError):
            if self._inode and self._path.lstat().st_ino == self._inode:
                self._inode = 0
                os.unlink(self._path)

    def close(self) -> None:
        """Closes it and takes its file away. May be called more than once."""
        self.remove()
        self._socket.close()
