"""One blocking connection to an engine process, which several threads may share.

Whoever waits for news reads the socket, for everybody (``client_handoff``); a thread of its own only looks every few
seconds, so that nothing piles up while nobody waits. A connection that ended while no request ran is made anew by the
next request. Always holds: a thread that is interrupted while it reads has either taken nothing, or every request ends
as cancelled, so that no record is ever lost unseen.
"""

from __future__ import annotations

import select
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from socket import SHUT_RDWR
from typing import Any

from jitgraph.errors import ConfigError, JitgraphError
from jitgraph.idle import IdleThread
from jitgraph.ipc.frames import ProtocolError, client_framer, encode
from jitgraph.ipc.messages import (
    AskStats,
    Beat,
    Cancel,
    FromEngine,
    Goodbye,
    Message,
    Refused,
    StartPhase,
    Stats,
    Tokens,
)
from jitgraph.ipc.sockets import Connection
from jitgraph.polling import FOR_AN_ANSWER_S, polling_s
from jitgraph.server.client_base import check_same_model
from jitgraph.server.client_channel import MAX_UNREAD
from jitgraph.server.client_errors import EngineGone, RequestRefused, refusal, user_error
from jitgraph.server.client_handoff import Handoff, Mailbox
from jitgraph.server.client_opening import Opened, open_connection
from jitgraph.server.client_records import check_tokens, loss
from jitgraph.server.client_text import RemoteLive, practise, take_record
from jitgraph.types import FinishReason

SILENT_S = 10.0
"""For how long an engine that is ready may say nothing; it beats several times a second."""
_TICK_S = 1.0


class Answer:
    """Counters that somebody asked for."""

    def __init__(self) -> None:
        self.mailbox = Mailbox()
        self.values: dict[str, Any] = {}
        self.error: JitgraphError | None = None


class Link:
    """Requests to one engine. Any thread; made ready by the constructor.

    Raises:
        EngineGone: nobody listens, the engine ended before it was ready, or time ran out.
        ConfigError: the socket is not one of this user's engines, or the engine speaks another protocol.
    """

    def __init__(
        self,
        path: Path,
        on_start: Callable[[StartPhase], None] | None,
        timeout_s: float,
        appear_s: float,
        spin_s: float | None = None,
    ) -> None:
        self._path = path
        self._on_start = on_start
        self._timeout_s = timeout_s
        self._sending = threading.Lock()
        """Held while something is sent, never while somebody waits for the engine's answer."""
        self._state = threading.Lock()
        """Held while requests are registered or the connection is given up; nobody waits inside."""
        self._requests: dict[int, RemoteLive] = {}
        self._answers: deque[Answer] = deque()
        self._abandoned: deque[RemoteLive] = deque()
        self._unbooked = 0
        """A request that has been sent and is about to be registered."""
        self._closed = False
        self._gone: str | None = None
        self._quiet_s = 0.0
        self._take_over(open_connection(path, on_start, timeout_s, appear_s))
        self._spin_s = polling_s(spin_s, self.ready.facts.device, FOR_AN_ANSWER_S)
        self._practice, self._rehearsal = client_framer(), client_framer()
        self._handoff = Handoff(self._read)
        self._keeper = IdleThread(self._keep)
        self._keeper.wake()

    # --------------------------------------------------------------------------------------------------------- opening

    def _revive(self) -> None:
        """Connects anew if the connection has ended. The caller holds ``_sending``."""
        if self._closed:
            raise ConfigError(f"this client of {self._path} has been closed: make a new one")
        self._look_for_its_end()
        if self._gone is None:
            return
        before, reason = self.ready.facts, self._gone
        try:
            opened = open_connection(self._path, self._on_start, self._timeout_s, 0.0)
        except EngineGone as error:
            raise EngineGone(f"{reason}; {error.reason}") from None
        try:
            check_same_model(self._path, before, opened.ready.facts, reason)
        except EngineGone:
            opened.connection.close()
            raise
        with self._state:
            self._take_over(opened)
            self._gone, self._quiet_s = None, 0.0

    def _take_over(self, opened: Opened) -> None:
        self._connection, self._socket, self._poller, self.ready = opened
        self._hangs_up = select.poll()
        self._hangs_up.register(opened.connected, 0)

    def _look_for_its_end(self) -> None:
        """While nothing runs nobody reads, so an engine that has ended may not have been noticed yet."""
        while self._gone is None and not self._requests and not self._answers and self._hangs_up.poll(0):
            if not self._handoff.read_if_free(lambda: self._read(0.0)):
                return  # whoever reads finds out

    # -------------------------------------------------------------------------------------------------------- requests

    def submit(self, live: RemoteLive, frame: bytes) -> None:
        """Registers a request and sends its frame.

        Raises:
            EngineGone: the engine process is gone.
            ConfigError: this link has been closed.
        """
        with self._sending:
            self._revive()
            self._register(live)
            self._send(frame)
            self._drop_abandoned()

    def fire(self, request_id: int, frame: bytes, book: Callable[[], RemoteLive]) -> RemoteLive:
        """``submit`` for a first token that somebody waits for: the frame goes first, and ``book`` makes the request's
        books while the engine is at work.

        Raises:
            EngineGone, ConfigError: as ``submit``.
        """
        with self._sending:
            self._revive()
            self._unbooked = request_id
            try:
                self._send(frame)
                try:
                    live = book()
                    self._register(live)
                except BaseException:  # interrupted: nobody would read it
                    with suppress(EngineGone):
                        self._send(encode(Cancel(request_id)))
                    raise
            finally:
                self._unbooked = 0
            if self._spin_s:
                practise(live, self._practice)  # the engine is at work, and there is time until it is done
            self._drop_abandoned()
        return live

    def _find(self, request_id: int) -> RemoteLive | None:
        """A request's books, which whoever has sent it may be making just now."""
        live = self._requests.get(request_id)
        if live is None and request_id == self._unbooked:
            with self._sending:
                live = self._requests.get(request_id)
        return live

    def _register(self, entry: RemoteLive | Answer) -> None:
        with self._state:
            if self._gone is not None:
                raise EngineGone(self._gone)
            if isinstance(entry, Answer):
                self._answers.append(entry)
            else:
                self._requests[entry.request.request_id] = entry

    def wait(self, mailbox: Mailbox) -> None:
        """Returns once there is news for ``mailbox``, which belongs to a request or an answer on its way."""
        try:
            self._handoff.wait(mailbox)
        except EngineGone:
            with self._state:  # another thread has given the connection up, and tells everybody
                if not mailbox.news:
                    raise

    def ask_stats(self) -> dict[str, Any]:
        """The engine's counters.

        Raises:
            EngineGone, ConfigError: as ``submit``.
        """
        answer = Answer()
        with self._sending:
            self._revive()
            self._register(answer)
            self._send(encode(AskStats()))
        self.wait(answer.mailbox)
        if answer.error is not None:
            raise answer.error
        return answer.values

    def end(self, live: RemoteLive) -> None:
        """Cancels a request if it still runs."""
        with self._sending:
            self._drop_abandoned()
            self._cancel(live)

    def abandon(self, live: RemoteLive) -> None:
        """Cancels a request whose reader was dropped. Waits for nothing: a collection may run while this thread holds
        any of the locks."""
        self._abandoned.append(live)
        if self._sending.acquire(blocking=False):
            try:
                self._connection.send_frame(encode(Cancel(live.request.request_id)))
            except ProtocolError:
                pass  # whoever waits or sends next finds out
            finally:
                self._sending.release()

    def _drop_abandoned(self) -> None:
        while self._abandoned:
            self._cancel(self._abandoned.popleft())

    def _cancel(self, live: RemoteLive) -> None:
        with self._state:
            running = self._requests.pop(live.request.request_id, None) is not None
        if not live.ended:
            live.finish_reason = FinishReason.CANCELLED
        if running and self._gone is None:
            with suppress(EngineGone):
                self._send(encode(Cancel(live.request.request_id)))
        self._handoff.deliver(live.mailbox)  # another thread may wait for it

    def _send(self, frame: bytes) -> None:
        """Sends a frame, all of it. The caller holds ``_sending``."""
        connection = self._connection
        try:
            connection.send_frame(frame)
            if connection.unsent:
                self._flush(connection)
        except (ProtocolError, EngineGone) as error:
            reason = error.reason if isinstance(error, EngineGone) else loss(error)
            self._fail(connection, reason)
            raise EngineGone(reason) from None
        except BaseException:  # interrupted: half a frame may be on its way
            self._fail(connection, "sending was interrupted", cancelled=True)
            raise

    def _flush(self, connection: Connection[FromEngine]) -> None:
        poller = select.poll()
        poller.register(connection.fileno(), select.POLLOUT)
        while connection.unsent:
            if not poller.poll(SILENT_S * 1e3):
                raise EngineGone(f"the engine process hangs: it has read nothing for {SILENT_S:g} s")
            connection.flush()

    # --------------------------------------------------------------------------------------------------------- reading

    def _read(self, wait_s: float = _TICK_S) -> None:
        """Waits for records and gives each to its own; for the one thread that reads.

        Raises:
            EngineGone: there is no connection any more.
        """
        connection, poller = self._connection, self._poller
        if self._gone is not None:
            raise EngineGone(self._gone)
        if not (self._spin_s and wait_s and self._spin(poller)) and not poller.poll(wait_s * 1e3):
            self._quiet_s += wait_s
            if self._quiet_s > SILENT_S:
                self._fail(connection, f"the engine process hangs: nothing came from it for {SILENT_S:g} s")
            return
        try:
            self._quiet_s = 0.0
            for record in connection.receive():
                self._take(record)
        except ProtocolError as error:
            self._fail(connection, loss(error))
        except BaseException:  # interrupted: a record may be lost
            self._fail(connection, "reading was interrupted", cancelled=True)
            raise

    def _spin(self, poller: select.poll) -> bool:
        """Polls without sleeping; whether something came."""
        end = time.perf_counter() + self._spin_s
        while time.perf_counter() < end:
            if poller.poll(0):
                return True
        return False

    def _take(self, record: FromEngine) -> None:
        if type(record) is Tokens:
            self._take_tokens(record)
        elif isinstance(record, Refused):
            live = self._find(record.request_id)
            if live is not None:
                self._forget(record.request_id)
                live.error = user_error(refusal(record))
                self._handoff.deliver(live.mailbox)
        elif isinstance(record, Stats):
            if self._answers:
                answer = self._answers.popleft()
                answer.values = record.values
                self._handoff.deliver(answer.mailbox)
        elif isinstance(record, Beat):
            self._rehearse()
        elif isinstance(record, Goodbye):
            self._fail(self._connection, record.reason)

    def _rehearse(self) -> None:
        """A beat: shortly before a lone request's first token, which then finds its way in the processor's caches."""
        if self._spin_s and len(self._requests) == 1:
            with self._state:
                live = next(iter(self._requests.values()), None)
            if isinstance(live, RemoteLive) and not live.token_ids:
                practise(live, self._rehearsal)

    def _take_tokens(self, record: Tokens) -> None:
        check_tokens(record)
        live = self._find(record.request_id)
        if live is None:
            return  # nobody reads it any more
        stopped = take_record(live, record, time.perf_counter_ns())
        if len(live.pending) > MAX_UNREAD:
            live.error = RequestRefused("overloaded", f"over {MAX_UNREAD} tokens were left unread: read the stream")
            stopped = True
        if live.ended:
            self._forget(record.request_id)
            if stopped:
                self._tell(Cancel(record.request_id))
        if live.ended or not live.whole:
            self._handoff.deliver(live.mailbox)

    def _forget(self, request_id: int) -> None:
        with self._state:
            self._requests.pop(request_id, None)

    def _tell(self, message: Message) -> None:
        with self._sending, suppress(EngineGone):
            if self._gone is None:
                self._send(encode(message))

    def _keep(self) -> bool:
        """Every few seconds: what came while nobody waited, and what nobody wants any more."""
        if self._gone is None:
            self._handoff.read_if_free(lambda: self._read(0.0))
            if self._abandoned:
                with self._sending:
                    self._drop_abandoned()
        return False

    # ------------------------------------------------------------------------------------------------------------- end

    def _fail(self, connection: Connection[FromEngine], reason: str, cancelled: bool = False) -> None:
        """Gives a connection up and tells everybody who waits; requests end with the error, or as cancelled."""
        with self._state:
            if self._gone is not None or connection is not self._connection:
                return
            self._gone = reason
            for live in self._requests.values():
                if cancelled:
                    live.finish_reason = FinishReason.CANCELLED
                else:
                    live.error = EngineGone(reason)
                self._handoff.deliver(live.mailbox)
            for answer in self._answers:
                answer.error = EngineGone(reason)
                self._handoff.deliver(answer.mailbox)
            self._requests.clear()
            self._answers.clear()
        with suppress(OSError):
            self._socket.shutdown(SHUT_RDWR)  # wakes a thread that polls it
        connection.close()

    def close(self) -> None:
        """Ends every request as cancelled, and the connection. May be called more than once."""
        self._closed = True
        self._fail(self._connection, "this client has been closed", cancelled=True)
        self._keeper.stop()
