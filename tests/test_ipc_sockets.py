"""Sockets that only their owner reaches, and connections that neither wait nor lose, whatever the other side does."""

from __future__ import annotations

import itertools
import os
import random
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jitgraph.errors import ConfigError
from jitgraph.ipc import sockets
from jitgraph.ipc.frames import ProtocolError, encode, engine_framer
from jitgraph.ipc.messages import AskStats, Cancel, Hello, Message, Submit, pack_params
from jitgraph.ipc.sockets import MAX_PATH_BYTES, Connection, check_peer, connect, listen, private_folder
from jitgraph.types import SamplingParams

BIG = Submit(1, b"x" * 100_000, pack_params(SamplingParams()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir(mode=0o700)
    return path


# -------------------------------------------------------------------------------------------------------------- folders


def test_a_folder_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        path = private_folder(tmp_path / "a" / "b")
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert private_folder(path) == path


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o701, 0o770, 0o777, 0o1777])
def test_a_folder_that_others_can_enter_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "open"
    path.mkdir()
    path.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 700"):
        private_folder(path)
    with pytest.raises(ConfigError, match="chmod 700"):
        listen(path / "s")


def test_a_folder_of_somebody_else_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.getuid()
    monkeypatch.setattr(sockets.os, "getuid", lambda: real + 1)
    with pytest.raises(ConfigError, match="of yours"):
        private_folder(folder)


def test_neither_a_link_nor_a_file_is_a_folder(tmp_path: Path, folder: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder)
    with pytest.raises(ConfigError):
        private_folder(link)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError, match="cannot be made"):
        private_folder(file)


# ------------------------------------------------------------------------------------------------------------ listening


def test_the_socket_is_its_owners_and_does_not_block(folder: Path) -> None:
    with listen(folder / "s") as listener:
        status = (folder / "s").lstat()
        assert stat.S_ISSOCK(status.st_mode)
        assert stat.S_IMODE(status.st_mode) == 0o600
        with pytest.raises(BlockingIOError):
            listener.accept()
        with connect(folder / "s", 5.0) as client:
            accepted, _ = listener.accept()
            with accepted:
                assert check_peer(accepted) == check_peer(client) == os.getpid()


def test_the_longest_path(folder: Path) -> None:
    room = MAX_PATH_BYTES - len(os.fsencode(folder)) - 1
    longest = folder / ("é" * (room // 2) + "x" * (room % 2))  # bytes count, not characters
    assert len(os.fsencode(longest)) == MAX_PATH_BYTES
    with listen(longest) as listener, connect(longest, 5.0), listener.accept()[0]:
        pass
    with pytest.raises(ConfigError, match=f"at most {MAX_PATH_BYTES} bytes"):
        listen(Path(f"{longest}y"))


def test_a_stale_socket_gives_way(folder: Path) -> None:
    path = folder / "s"
    listen(path).close()  # a process that ends without a word leaves the file
    assert path.is_socket()
    with listen(path) as listener, connect(path, 5.0), listener.accept()[0]:
        pass


def test_a_live_socket_does_not(folder: Path) -> None:
    path = folder / "s"
    with listen(path) as listener:
        with pytest.raises(ConfigError, match=r"listens at .* already"):
            listen(path)
        listener.accept()[0].close()  # the look that found it alive
        with connect(path, 5.0), listener.accept()[0]:
            pass


def test_an_engine_too_busy_to_accept_is_alive(folder: Path) -> None:
    path = folder / "s"
    waiting: list[socket.socket] = []
    with listen(path):
        for _ in range(1000):
            client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            client.setblocking(False)
            waiting.append(client)
            try:
                client.connect(str(path))
            except BlockingIOError:
                break
        else:
            pytest.fail("the queue of connections never filled")
        with pytest.raises(ConfigError, match=r"listens at .* already"):
            listen(path)
        assert path.is_socket()
        for client in waiting:
            client.close()


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_is_no_socket_stays(folder: Path, kind: str) -> None:
    path = folder / "s"
    if kind == "file":
        path.write_text("mine")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(folder / "elsewhere")
    with pytest.raises(ConfigError, match="no socket"):
        listen(path)
    assert os.path.lexists(path)


def test_of_engines_that_start_at_once_one_listens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where one looks while another's socket is bound and does not listen yet."""
    path = folder / "s"
    chmod = os.chmod

    def slow_chmod(target: Path, mode: int) -> None:
        time.sleep(0.03)
        chmod(target, mode)

    monkeypatch.setattr(sockets.os, "chmod", slow_chmod)
    for _ in range(4):
        barrier = threading.Barrier(4)
        won: list[socket.socket] = []
        refused: list[str] = []

        def start(barrier: threading.Barrier = barrier, won: Any = won, refused: Any = refused) -> None:
            barrier.wait()
            try:
                won.append(listen(path))
            except ConfigError as error:
                refused.append(str(error))

        threads = [threading.Thread(target=start) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(won), len(refused)) == (1, 3), refused
        while True:
            try:
                won[0].accept()[0].close()  # the looks of the others
            except BlockingIOError:
                break
        with connect(path, 5.0), won[0].accept()[0]:
            pass
        won[0].close()


# ----------------------------------------------------------------------------------------------------------- connecting


def test_nobody_there(folder: Path) -> None:
    with pytest.raises(FileNotFoundError):
        connect(folder / "s", 1.0)
    listen(folder / "s").close()
    with pytest.raises(ConnectionRefusedError):
        connect(folder / "s", 1.0)


class Stranger:
    """A socket whose other end belongs to another user."""

    def __init__(self, uid: int) -> None:
        self.uid = uid

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        assert (level, option) == (socket.SOL_SOCKET, socket.SO_PEERCRED)
        return struct.pack("3i", 4321, self.uid, 0)[:size]


def test_a_peer_of_another_user_is_refused() -> None:
    with pytest.raises(PermissionError, match=f"4321 of user {os.getuid() + 1}"):
        check_peer(Stranger(os.getuid() + 1))  # type: ignore[arg-type]
    assert check_peer(Stranger(os.getuid())) == 4321  # type: ignore[arg-type]


def test_connecting_to_another_users_engine_leaves_nothing_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.getuid()
    with listen(folder / "s") as listener:
        monkeypatch.setattr(sockets.os, "getuid", lambda: real + 1)
        with pytest.raises(PermissionError):
            connect(folder / "s", 1.0)
        accepted, _ = listener.accept()
        with accepted:
            accepted.settimeout(5.0)
            assert accepted.recv(1) == b""


# ---------------------------------------------------------------------------------------------------------- connections


class Fickle(socket.socket):
    """A socket that sends and receives little at a time, and is interrupted or not ready now and then."""

    rng = random.Random(0)
    most = 1
    troubles: tuple[type[OSError], ...] = (InterruptedError, BlockingIOError)

    def _trouble(self) -> None:
        if self.troubles and self.rng.random() < 0.3:
            raise self.rng.choice(self.troubles)

    def send(self, data: Any, flags: int = 0) -> int:
        self._trouble()
        return super().send(bytes(data)[: self.rng.randint(1, self.most)], flags)

    def recv(self, size: int, flags: int = 0) -> bytes:
        self._trouble()
        return super().recv(min(size, self.rng.randint(1, self.most)), flags)


def fickle(plain: socket.socket, rng: random.Random, most: int) -> Fickle:
    made = Fickle(fileno=plain.detach())
    made.rng, made.most = rng, most
    return made


def pair(most_unsent: int = 8 * 2**20) -> tuple[Connection[Any], Connection[Any]]:
    left, right = socket.socketpair(socket.AF_UNIX)
    return Connection(left, engine_framer(), most_unsent), Connection(right, engine_framer(), most_unsent)


@pytest.fixture
def ends() -> Iterator[tuple[Connection[Any], Connection[Any]]]:
    left, right = pair()
    yield left, right
    left.close()
    right.close()


def receive_all(connection: Connection[Any], sender: Connection[Any] | None = None) -> list[Any]:
    """Everything on its way, with the sender's help where something waits there."""
    got: list[Any] = []
    while True:
        if sender is not None:
            sender.flush()
        before = len(got), connection._framer.held
        got += connection.receive()
        if (len(got), connection._framer.held) == before and not (sender is not None and sender.unsent):
            return got


def test_both_ways(ends: tuple[Connection[Any], Connection[Any]]) -> None:
    left, right = ends
    assert list(right.receive()) == []  # nothing there, no waiting
    left.send(Cancel(1))
    left.send(AskStats())
    right.send(Cancel(2))
    assert list(right.receive()) == [Cancel(1), AskStats()]
    assert list(left.receive()) == [Cancel(2)]
    assert left.unsent == right.unsent == 0


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32), most=st.sampled_from([1, 3, 50, 5000]), actions=st.lists(st.integers(0, 3), max_size=40)
)
def test_nothing_is_lost_or_reordered(seed: int, most: int, actions: list[int]) -> None:
    """Sends, flushes and reads in any order, over a socket that takes and gives little at a time."""
    rng = random.Random(seed)
    left, right = socket.socketpair(socket.AF_UNIX)
    with fickle(left, rng, most) as sending, fickle(right, rng, most) as receiving:
        sender: Connection[Any] = Connection(sending, engine_framer())
        receiver: Connection[Any] = Connection(receiving, engine_framer())
        sent: list[Message] = []
        got: list[Message] = []
        for action in actions:
            if action <= 1:
                sent.append(Cancel(len(sent)) if action else Hello(len(sent), "y" * rng.randrange(200)))
                sender.send(sent[-1])
            elif action == 2:
                sender.flush()
            else:
                got += receiver.receive()
        Fickle.troubles = ()
        try:
            while len(got) < len(sent):
                sender.flush()
                got += receiver.receive()
        finally:
            Fickle.troubles = (InterruptedError, BlockingIOError)
        assert got == sent
        assert sender.unsent == 0


def test_signals_do_not_disturb(ends: tuple[Connection[Any], Connection[Any]]) -> None:
    left, right = ends
    caught: list[int] = []
    old = signal.signal(signal.SIGVTALRM, lambda number, frame: caught.append(number))
    signal.setitimer(signal.ITIMER_VIRTUAL, 0.0005, 0.0005)
    try:
        sent = 0
        got: list[Any] = []
        while len(caught) < 20 or sent < 50:
            left.send(BIG)
            sent += 1
            got += receive_all(right, left)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, old)
    assert got == [BIG] * sent


def test_a_slow_reader_costs_no_waiting_and_bounded_memory() -> None:
    left, right = pair(most_unsent=1_000_000)
    frame = len(encode(BIG))
    most = sent = 0
    with pytest.raises(ProtocolError, match="left more than 1000000 bytes unread"):
        while True:  # never waits: the test would hang
            left.send(BIG)
            sent += 1
            most = max(most, left.unsent)
    assert 1_000_000 - frame < most <= 1_000_000
    assert left.unsent <= frame  # given up, and its memory with it; what has begun is sent to its end
    got = receive_all(right)
    assert got == [BIG] * len(got)
    assert 0 < len(got) < sent
    left.close()
    right.close()


def test_a_connection_given_up_sends_no_more_but_receives() -> None:
    """A frame has gone out in part: whatever followed it would be garbage to its reader."""
    left, right = pair(most_unsent=200_000)
    right.send(Cancel(7))
    with pytest.raises(ProtocolError):
        while True:
            left.send(BIG)
    with pytest.raises(ProtocolError, match="unread"):
        left.send(Cancel(1))
    receive_all(right, left)
    with pytest.raises(ProtocolError, match="unread"):
        left.send(Cancel(1))
    assert receive_all(right, left) == []
    assert list(left.receive()) == [Cancel(7)]
    left.close()
    right.close()


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 60_000), max_size=60),
    most=st.integers(0, 300_000),
    reads=st.lists(st.booleans(), max_size=60),
)
def test_a_last_record_arrives_whole_whatever_waits(sizes: list[int], most: int, reads: list[bool]) -> None:
    """Also where the reader was too slow: then what had not begun is left out, and nothing is torn."""
    left, right = pair(most_unsent=most)
    taken, got = 0, []
    for size, read in itertools.zip_longest(sizes, reads, fillvalue=False):
        try:
            left.send(Submit(taken, b"x" * int(size), BIG.params))
            taken += 1
        except ProtocolError:
            break
        if read:
            got += list(right.receive())
            left.flush()
    left.send_last(Cancel(77))
    for record in (Cancel(1), AskStats()):
        with pytest.raises(ProtocolError):
            left.send(record)
    got += receive_all(right, left)
    assert got[-1] == Cancel(77)
    numbers = [record.request_id for record in got[:-1]]
    assert numbers == list(range(len(numbers))), "in order, and none after one that was left out"
    assert len(numbers) == taken or "unread" in left._broken
    left.finish()
    with pytest.raises(ProtocolError, match="closed the connection"):
        list(right.receive())
    right.close()
    with pytest.raises(ProtocolError):
        left.discard()
    left.close()


def test_what_is_thrown_away_does_not_reset_the_connection() -> None:
    """A Unix socket closed with something unread in it resets its peer, which may then lose the reason."""
    left, right = pair()
    right.send(Cancel(1))
    left.send_last(Cancel(2))
    left.finish()
    left.discard()
    left.close()
    assert list(right.receive()) == [Cancel(2)]
    with pytest.raises(ProtocolError, match="closed the connection"):
        list(right.receive())
    right.close()


def test_a_slow_reader_that_comes_back_has_lost_nothing() -> None:
    left, right = pair()
    for _ in range(40):
        left.send(BIG)
    assert left.unsent > 1_000_000
    assert receive_all(right, left) == [BIG] * 40
    left.close()
    right.close()


def test_one_frame_may_be_larger_than_what_may_wait() -> None:
    huge = Submit(1, b"x" * 5_000_000, BIG.params)
    left, right = pair(most_unsent=1000)
    left.send(huge)
    with pytest.raises(ProtocolError, match="unread"):
        left.send(AskStats())
    left.close()
    right.close()
    left, right = pair(most_unsent=1000)
    left.send(huge)
    assert receive_all(right, left) == [huge]
    left.close()
    right.close()


def test_a_half_closed_connection_still_carries_answers() -> None:
    plain, socket_right = socket.socketpair(socket.AF_UNIX)
    right: Connection[Any] = Connection(socket_right, engine_framer())
    plain.sendall(encode(Cancel(1)) + encode(Cancel(2))[:3])
    plain.shutdown(socket.SHUT_WR)
    assert list(right.receive()) == [Cancel(1)]
    for _ in range(2):
        with pytest.raises(ProtocolError, match="closed the connection"):
            list(right.receive())
    right.send(AskStats())
    assert plain.recv(1000) == encode(AskStats())
    plain.close()
    right.close()


def test_what_a_peer_said_before_it_went_arrives(ends: tuple[Connection[Any], Connection[Any]]) -> None:
    left, right = ends
    left.send(Cancel(1))
    left.close()
    with pytest.raises(ProtocolError, match="gone"):
        right.send(AskStats())
    assert list(right.receive()) == [Cancel(1)]
    with pytest.raises(ProtocolError, match=r"closed|gone"):
        list(right.receive())


def test_a_peer_that_went_is_no_signal(tmp_path: Path) -> None:
    """Also where SIGPIPE has its default effect, which ends the process."""
    program = (
        "import signal, socket\n"
        "from jitgraph.ipc.frames import ProtocolError, engine_framer\n"
        "from jitgraph.ipc.messages import AskStats\n"
        "from jitgraph.ipc.sockets import Connection\n"
        "signal.signal(signal.SIGPIPE, signal.SIG_DFL)\n"
        "left, right = socket.socketpair()\n"
        "right.close()\n"
        "try:\n"
        "    Connection(left, engine_framer()).send(AskStats())\n"
        "except ProtocolError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "the other side is gone: Broken pipe\n"), done.stderr


def test_garbage_ends_the_connection(ends: tuple[Connection[Any], Connection[Any]]) -> None:
    left, right = ends
    left.send_frame(b"\xff\xff\xff\xff")
    for _ in range(2):
        with pytest.raises(ProtocolError, match="over the limit"):
            list(right.receive())
        left.send(AskStats())


def test_closing(ends: tuple[Connection[Any], Connection[Any]]) -> None:
    left, right = ends
    for _ in range(20):
        left.send(BIG)
    assert left.unsent > 0
    left.close()
    left.close()
    assert left.closed
    assert (left.unsent, left.fileno()) == (0, -1)
    for action in (lambda: left.send(AskStats()), lambda: list(left.receive())):
        with pytest.raises(ProtocolError):
            action()
    left.flush()
    with pytest.raises(ProtocolError, match="closed"):
        while True:
            list(right.receive())
