"""The clients of one engine process: accepting, greeting, reading, sending, parting. No torch.

One thread at a time owns a hub: before ready the lobby's, then the engine's; another may only broadcast signs of life
(``broadcast_beside``). Always holds: nothing here waits for a client. One that breaks the protocol, or reads nothing
for long, loses its own connection, is told why, and disturbs nobody else. One that falls behind loses the requests with
the most unread news, the largest first, and keeps the rest.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import threading
import time
from collections.abc import Hashable, Sequence
from contextlib import suppress

from jitgraph.engine.service_client import Client, Handler
from jitgraph.ipc.frames import ProtocolError, encode
from jitgraph.ipc.listener import Listener
from jitgraph.ipc.messages import PROTOCOL, FromClient, Goodbye, Hello, Message, Welcome
from jitgraph.ipc.sockets import MAX_UNSENT_BYTES

MAX_CLIENTS = 64
"""Connections at once; further ones are sent away with a reason."""
HELLO_S = 10.0
"""A connection that has not said hello for so long is closed."""
UNREAD_S = 60.0
"""A client that reads nothing of what waits for it for so long is sent away."""
RECORDS_A_LOOK = 64
"""Records of one client that are handled in one look: whoever floods the engine holds up nobody else."""
PART_S = 10.0
"""Who is sent away has so long to read why."""
LINGER_S = 0.05
"""At the end: how long those may take to close their side who have been sent everything."""
_ACCEPT_AGAIN_S = 1.0
_READ = select.EPOLLIN
_BOTH = select.EPOLLIN | select.EPOLLOUT
_LOGGER = logging.getLogger(__name__)


class Hub:
    """Listener, connections and the poller that watches them."""

    def __init__(self, listener: Listener, most_unsent: int = MAX_UNSENT_BYTES) -> None:
        self.listener = listener
        self.handler: Handler | None = None
        self.most_unsent = most_unsent
        """Bytes that may wait for one client (see ``sockets.MAX_UNSENT_BYTES``)."""
        self._clients: dict[int, Client] = {}
        self._parting: dict[int, Client] = {}
        """Those sent away, who have not read why yet."""
        self._behind: set[Client] = set()
        self._accept_again_s: float | None = None
        self._guard = threading.RLock()
        """Held while anything is written to a connection, or one comes or goes."""
        self._bell, self._rope = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._signals = False
        self._epoll = select.epoll()
        self._epoll.register(listener.fileno(), _READ)
        self._epoll.register(self._bell, _READ)

    @property
    def clients(self) -> list[Client]:
        """Those that have been welcomed."""
        return [client for client in self._clients.values() if client.welcomed]

    def wake(self) -> None:
        """Ends a ``look`` that waits. From any thread, or a signal's handler."""
        with suppress(OSError):  # full: it will wake anyway; or closed
            os.write(self._rope, b"\0")

    def wake_on_signals(self) -> None:
        """From now on any signal ends a ``look`` that waits, whichever thread the kernel interrupts for it, and so its
        Python handler runs at once. Main thread, once in a process; ``close`` ends it."""
        signal.set_wakeup_fd(self._rope, warn_on_full_buffer=False)
        self._signals = True

    # ---------------------------------------------------------------------------------------------------------- reading

    def look(self, timeout_s: float) -> None:
        """Handles what clients have sent, some records of each; waits for it at most so long."""
        behind = tuple(self._behind)
        for descriptor, events in self._epoll.poll(0.0 if behind else timeout_s):
            client = self._clients.get(descriptor)
            if client is not None:
                if events & select.EPOLLOUT:
                    self._flush(client)
                if events & ~select.EPOLLOUT and client.here:
                    self._read(client)
            elif descriptor == self._bell:
                os.read(self._bell, 4096)
            elif descriptor == self.listener.fileno():
                self._accept()
            else:
                self._see_off(descriptor, events)
        for client in behind:
            if client.records is not None:
                self._read(client)

    def _read(self, client: Client) -> None:
        records, client.records = client.records or client.connection.receive(), None
        self._behind.discard(client)
        count = 0
        try:
            for record in records:
                self._hear(client, record)
                if not client.here:
                    return
                count += 1
                if count >= RECORDS_A_LOOK:
                    client.records = records
                    self._behind.add(client)
                    return
        except ProtocolError as error:
            self.dismiss(client, str(error))

    def _hear(self, client: Client, record: FromClient) -> None:
        assert self.handler is not None
        if client.welcomed:
            self.handler.hear(client, record)
        elif type(record) is not Hello:
            raise ProtocolError("the first record must be Hello")
        elif record.version != PROTOCOL:
            raise ProtocolError(
                f"this engine speaks version {PROTOCOL} of the protocol, the client version {record.version}: "
                "use one version of jitgraph on both sides"
            )
        else:
            client.name, client.welcomed = record.name, True
            client.connection.greeted()
            self.send(client, Welcome(PROTOCOL, os.getpid(), self.handler.facts))
            if client.here:
                self.handler.joined(client)

    def _accept(self) -> None:
        try:
            accepted = self.listener.accept(self.most_unsent)
        except OSError:  # too many open files: the queue waits until somebody leaves
            self._epoll.unregister(self.listener.fileno())
            self._accept_again_s = time.monotonic() + _ACCEPT_AGAIN_S
            return
        if accepted is None:
            return
        client = Client(*accepted)
        with self._guard:
            self._clients[client.connection.fileno()] = client
        self._epoll.register(client.connection.fileno(), _READ)
        if len(self._clients) > MAX_CLIENTS:
            self.dismiss(client, f"this engine has {MAX_CLIENTS} clients already: close one of them")

    def tick(self) -> None:
        """Now and then: closes what never said hello, does not read, or does not read why it was sent away, and accepts
        again."""
        now = time.monotonic()
        for client in [one for one in self._parting.values() if now >= one.until_s]:
            self._close(client)
        for client in [one for one in self._clients.values() if not one.welcomed and now - one.opened_s > HELLO_S]:
            self.dismiss(client, f"no Hello within {HELLO_S:g} s")
        for client in [one for one in self._clients.values() if one.connection.stuck_s(now) > UNREAD_S]:
            waits = client.connection.unsent
            self.dismiss(client, f"nothing was read for {UNREAD_S:g} s of the {waits} bytes that wait")
        if self._accept_again_s is not None and now >= self._accept_again_s:
            self._accept_again_s = None
            self._epoll.register(self.listener.fileno(), _READ)

    # ---------------------------------------------------------------------------------------------------------- sending

    def send(self, client: Client, record: Message) -> None:
        """Sends a record, now or as soon as the client reads; one that can get none is dropped, and one that leaves too
        many of these unread is sent away.

        Raises:
            ProtocolError: the record is too large for any frame.
        """
        self.send_frame(client, encode(record))

    def send_frame(self, client: Client, frame: bytes) -> None:
        """``send`` for records that are encoded already."""
        if not client.here:
            return
        try:
            with self._guard:
                client.connection.send_frame(frame)
        except ProtocolError as error:
            self.dismiss(client, str(error))
            return
        if client.connection.unsent:
            self._watch_for_room(client)

    def send_owned(self, client: Client, frames: Sequence[tuple[Hashable, bytes]]) -> None:
        """Sends frames, each with whom it is about. Where the client leaves too much unread, the handler hears whose
        frames are most of it, and takes them back."""
        connection = client.connection
        if not client.here:
            return
        try:
            with self._guard:
                connection.send_owned(frames)
        except ProtocolError as error:
            self.dismiss(client, str(error))
            return
        if not connection.unsent:
            return
        self._watch_for_room(client)
        while client.here and (owner := connection.behind) is not None:
            assert self.handler is not None
            with self._guard:
                self.handler.behind(client, owner)

    def _watch_for_room(self, client: Client) -> None:
        if not client.writing:
            client.writing = True
            self._epoll.modify(client.connection.fileno(), _BOTH)

    def broadcast(self, record: Message) -> None:
        """Sends a record to all."""
        frame = encode(record)
        for client in self.clients:
            self.send_frame(client, frame)

    def broadcast_beside(self, record: Message) -> None:
        """Sends a sign of life to all who have read what they were sent. From any thread, while the hub's own is busy
        elsewhere; who cannot be reached is left to that."""
        frame = encode(record)
        with self._guard:
            for client in self.clients:
                connection = client.connection
                if client.here and connection.unsent == 0:
                    with suppress(ProtocolError):
                        connection.send_frame(frame)
                    if connection.unsent:
                        self._watch_for_room(client)

    def _flush(self, client: Client) -> None:
        connection = client.connection
        try:
            with self._guard:
                connection.flush()
                if not connection.unsent:
                    client.writing = False
                    self._epoll.modify(connection.fileno(), _READ)
        except ProtocolError:
            self.drop(client)

    # ---------------------------------------------------------------------------------------------------------- parting

    def dismiss(self, client: Client, reason: str) -> None:
        """Sends a client away: it is one no more, and has some time to read why. May be called more than once."""
        if not client.here:
            return
        _LOGGER.info("client %s (process %d) is sent away: %s", client.name or "without a name", client.pid, reason)
        while len(self._parting) >= MAX_CLIENTS:
            self._close(next(iter(self._parting.values())))
        self._part(client, reason, PART_S)
        if self.handler is not None:
            self.handler.left(client)

    def drop(self, client: Client) -> None:
        """Closes a connection at once: the client has gone. May be called more than once."""
        if not client.here:
            return
        self._strike_off(client)
        self._close(client)
        if self.handler is not None:
            self.handler.left(client)

    def _strike_off(self, client: Client) -> None:
        client.here = False
        client.records = None
        with self._guard:
            del self._clients[client.connection.fileno()]
        self._behind.discard(client)

    def _part(self, client: Client, reason: str, patience_s: float) -> None:
        """Says goodbye. What the client still sends is thrown away until it closes its side: a connection that is
        closed with something unread is reset, and the client may lose the reason."""
        self._strike_off(client)
        descriptor = client.connection.fileno()
        self._parting[descriptor] = client
        client.until_s = time.monotonic() + patience_s
        try:
            client.connection.send_last(Goodbye(reason))
        except ProtocolError:
            self._close(client)
            return
        self._epoll.modify(descriptor, _BOTH)
        self._see_off(descriptor, 0)

    def _see_off(self, descriptor: int, events: int) -> None:
        """Sends what waits for somebody who parts, and closes once the other side has."""
        client = self._parting.get(descriptor)
        if client is None:
            return
        connection = client.connection
        try:
            connection.flush()
            if not connection.unsent:
                connection.finish()
                self._epoll.modify(descriptor, _READ)
            if events & ~select.EPOLLOUT:
                connection.discard()
        except ProtocolError:
            self._close(client)

    def _close(self, client: Client) -> None:
        connection = client.connection
        self._parting.pop(connection.fileno(), None)
        self._epoll.unregister(connection.fileno())
        connection.close()

    def close(self, reason: str, patience_s: float = 1.0) -> None:
        """Says goodbye to all, gives what they have not read yet so long to leave, and closes everything. Further
        calls do nothing."""
        if self._epoll.closed:
            return
        if self._signals:
            signal.set_wakeup_fd(-1)
        self.listener.remove()
        self.handler = None
        self._epoll.close()
        self._epoll = select.epoll()  # for those who part, and nobody else
        for client in list(self._parting.values()):
            self._epoll.register(client.connection.fileno(), _READ)
        for client in list(self._clients.values()):
            self._epoll.register(client.connection.fileno(), _READ)
            self._part(client, reason, patience_s)
        self._see_all_off(time.monotonic() + patience_s)
        for client in list(self._parting.values()):
            self._close(client)
        self.listener.close()
        self._epoll.close()
        rope, self._rope = self._rope, -1
        os.close(self._bell)
        os.close(rope)

    def _see_all_off(self, deadline_s: float) -> None:
        """Until everybody has closed its side, or has had everything for a moment, or time is up."""
        linger_s: float | None = None
        while self._parting:
            now = time.monotonic()
            if linger_s is None and not any(one.connection.unsent for one in self._parting.values()):
                linger_s = now + LINGER_S
            left_s = min(deadline_s, linger_s or deadline_s) - now
            if left_s <= 0:
                return
            for descriptor, events in self._epoll.poll(left_s):
                self._see_off(descriptor, events)
