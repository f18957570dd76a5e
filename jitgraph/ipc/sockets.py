"""Unix sockets that only their owner can reach, and a connection that never makes its owner wait.

A socket lies in a folder of mode 0700; whoever connects or accepts also checks that the peer's process has the same
user (``SO_PEERCRED``).
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import struct
import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Generic, TypeVar

from jitgraph.errors import ConfigError
from jitgraph.ipc.frames import MAX_FRAME_BYTES, Framer, ProtocolError, encode
from jitgraph.ipc.messages import Message
from jitgraph.ipc.outbox import Outbox, Owner

MAX_PATH_BYTES = 107
"""Longest path of a Unix socket on Linux."""
MAX_UNSENT_BYTES = MAX_FRAME_BYTES
"""What may wait for a slow reader: of frames without an owner before its connection is given up, and as much again of
frames with one before owners are given up. The largest frame fits."""
_READ_BYTES = 64 * 1024
_BACKLOG = 64
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid

T = TypeVar("T")


class PeerGone(ProtocolError):
    """The other side has closed the connection, or its process has ended."""


def private_folder(path: Path) -> Path:
    """Makes a folder that only this user can enter, or checks that it is one.

    Raises:
        ConfigError: it belongs to somebody else, or others can enter it, or it cannot be made.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.lstat()
    except OSError as error:
        raise ConfigError(f"{path} cannot be made: {error.strerror}") from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ConfigError(f"{path} must be a folder of yours that nobody else can enter: chmod 700 it, or name another")
    return path


def listen(path: Path) -> socket.socket:
    """A listening socket at ``path``, non-blocking. What an engine that died has left there is removed; one that lives
    is not.

    Raises:
        ConfigError: an engine listens there, something else lies there, or the path does not do for a socket.
    """
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise ConfigError(f"the socket's path must be at most {MAX_PATH_BYTES} bytes long: {path}")
    private_folder(path.parent)
    with _one_at_a_time(path.parent):
        _remove_stale(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(str(path))
            os.chmod(path, 0o600)
            listener.listen(_BACKLOG)
            listener.setblocking(False)
        except OSError as error:
            listener.close()
            raise ConfigError(f"cannot listen at {path}: {error.strerror}") from error
    return listener


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Of two engines that start at once, neither takes the other's socket, bound but not yet listening, for a stale
    one. The lock ends with its process, and leaves no file."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_stale(path: Path) -> None:
    try:
        is_socket = stat.S_ISSOCK(path.lstat().st_mode)
    except FileNotFoundError:
        return
    if not is_socket:
        raise ConfigError(f"{path} exists and is no socket: remove it or name another")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except FileNotFoundError:
            return
        except (BlockingIOError, TimeoutError):
            pass  # somebody listens, and is too busy to accept
        except OSError as error:
            raise ConfigError(f"{path} cannot be looked at: {error.strerror}") from error
    raise ConfigError(f"an engine listens at {path} already: stop it or name another socket")


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Two sockets of this process, connected with each other."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)


def connect(path: Path, timeout_s: float | None = None) -> socket.socket:
    """A connected socket, in blocking mode with that timeout.

    Raises:
        OSError: nobody listens there.
        PermissionError: another user's process does.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout_s)
        connection.connect(str(path))
        check_peer(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def check_peer(connection: socket.socket) -> int:
    """The process id at the other end.

    Raises:
        PermissionError: it belongs to another user.
    """
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(packed)
    if uid != os.getuid():
        raise PermissionError(errno.EPERM, f"process {pid} of user {uid} is not allowed to talk to this one")
    return int(pid)


class Connection(Generic[T]):
    """One end of a connection, never blocking: what cannot be sent now waits here, up to a limit.

    One thread at a time. Its owner polls ``fileno`` for reading, and for writing while ``unsent``. Frames that name an
    owner are taken over the limit too: whoever names owners looks at ``behind`` and takes some back. After a failed
    ``send`` nothing more is sent but the rest of a frame that has begun and one last record (``send_last``), and after
    a failed ``flush`` nothing at all; what has arrived can still be received.
    """

    def __init__(self, connected: socket.socket, framer: Framer[T], most_unsent: int = MAX_UNSENT_BYTES) -> None:
        connected.setblocking(False)
        self._socket = connected
        self._framer = framer
        self._most = most_unsent
        self._outbox = Outbox()
        self._moved_s = 0.0
        self._broken = ""
        self._gone = False
        self.closed = False

    def fileno(self) -> int:
        """For pollers."""
        return self._socket.fileno()

    def greeted(self) -> None:
        """The other side has said hello: from now on its frames may be of any size."""
        self._framer.most = MAX_FRAME_BYTES

    @property
    def unsent(self) -> int:
        """Bytes that wait to be sent."""
        return self._outbox.size

    @property
    def behind(self) -> Hashable | None:
        """Whose frames should be taken back: the largest owner, where more than the limit waits of all of them."""
        return self._outbox.heaviest() if self._outbox.owned > self._most else None

    def stuck_s(self, now_s: float) -> float:
        """For how long the other side has read nothing of what waits; 0 where nothing waits. ``now_s``:
        ``time.monotonic``."""
        return now_s - self._moved_s if self._outbox.size else 0.0

    def send(self, message: Message) -> None:
        """Sends a record, or keeps it until ``flush`` can.

        Raises:
            ProtocolError: the record cannot be encoded; the other side has not read for so long that the limit is
                reached; or it is gone.
        """
        self.send_frame(encode(message))

    def send_frame(self, frame: bytes) -> None:
        """``send`` for a record that is encoded already. One frame may be larger than the limit where none waits."""
        if self._broken:
            raise ProtocolError(self._broken)
        loose = self._outbox.loose
        if loose and loose + len(frame) > self._most:
            self._broken = f"the other side left more than {self._most} bytes unread"
            self._outbox.take_all_back()
            raise ProtocolError(self._broken)
        self._append([(None, frame)])

    def send_owned(self, frames: Sequence[tuple[Hashable, bytes]]) -> None:
        """Sends frames with their owners, or keeps them.

        Raises:
            ProtocolError: an earlier ``send`` has failed, or the other side is gone.
        """
        if self._broken:
            raise ProtocolError(self._broken)
        self._append(frames)

    def take_back(self, owner: Hashable) -> int:
        """Forgets an owner's frames that wait, but for one that has begun; how many bytes that were."""
        return self._outbox.take_back(owner)

    def send_last(self, message: Message) -> None:
        """Sends a record after which nothing can follow, and which no limit keeps back: why the connection ends.

        Raises:
            PeerGone: the other side is gone.
        """
        frame = encode(message)
        if self._gone:
            raise ProtocolError(self._broken)
        self._append([(None, frame)])
        self._broken = self._broken or "the last record has been sent"

    def _append(self, frames: Sequence[tuple[Owner, bytes]]) -> None:
        """Behind what waits; where nothing does, what the socket takes goes at once."""
        outbox, sent = self._outbox, 0
        if not outbox.size:
            data = frames[0][1] if len(frames) == 1 else b"".join(frame for _, frame in frames)
            sent = self._write(data)
            if sent == len(data):
                return
            self._moved_s = time.monotonic()
        for owner, frame in frames:
            if sent >= len(frame):
                sent -= len(frame)
            else:
                outbox.add(owner, frame[sent:], begun=sent > 0)
                sent = 0

    def _lost(self, reason: str) -> ProtocolError:
        self._broken, self._gone = reason, True
        self._outbox.clear()
        return PeerGone(reason)

    def flush(self) -> None:
        """Sends what waits, as much as goes.

        Raises:
            PeerGone: the other side is gone.
        """
        while self._outbox.size:
            sent = self._write(self._outbox.front(_READ_BYTES))
            if not sent:
                return
            self._outbox.sent(sent)
            self._moved_s = time.monotonic()

    def finish(self) -> None:
        """Tells the other side that nothing follows. May be called more than once."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def _write(self, data: bytes) -> int:
        try:
            return self._socket.send(data, socket.MSG_NOSIGNAL)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            raise self._lost(f"the other side is gone: {error.strerror}") from error

    def receive(self) -> Iterator[T]:
        """The records that have arrived, without waiting.

        Raises:
            PeerGone: the other side is gone.
            ProtocolError: it does not keep to the protocol.
        """
        data = self._read()
        if data:
            yield from self._framer.feed(data)

    def discard(self) -> None:
        """Throws away what has arrived. Where a connection is closed with something unread, the other side may lose
        what it was sent last.

        Raises:
            PeerGone: the other side is gone.
        """
        self._read()

    def _read(self) -> bytes:
        """What has arrived; nothing where nothing has."""
        try:
            data = self._socket.recv(_READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return b""
        except OSError as error:
            raise PeerGone(f"the other side is gone: {error.strerror}") from error
        if not data:
            raise PeerGone("the other side has closed the connection")
        return data

    def close(self) -> None:
        """Closes it, at once. May be called more than once."""
        self.closed = True
        self._lost(self._broken or "the connection is closed")
        with suppress(OSError):
            self._socket.close()
