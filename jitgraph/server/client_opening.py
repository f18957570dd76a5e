"""How a blocking client finds its engine and waits for it to be ready. Any thread; nothing is kept here."""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from pathlib import Path
from socket import socket
from typing import NamedTuple

from jitgraph.errors import ConfigError
from jitgraph.ipc.frames import ProtocolError, client_framer
from jitgraph.ipc.messages import Beat, FromEngine, Goodbye, Ready, StartPhase, Welcome
from jitgraph.ipc.sockets import Connection, connect
from jitgraph.server.client_errors import EngineGone
from jitgraph.server.client_records import check_path, hello, loss, nobody_there, welcomed

_LOOK_AGAIN_S = 0.02


class Opened(NamedTuple):
    """A connection to an engine that is ready."""

    connection: Connection[FromEngine]
    connected: socket
    """The connection's own."""
    poller: select.poll
    """Watches it for reading."""
    ready: Ready


def open_connection(
    path: Path, on_start: Callable[[StartPhase], None] | None, timeout_s: float, appear_s: float
) -> Opened:
    """Connects, and returns once the engine is ready; ``on_start`` hears how the start proceeds.

    Raises:
        EngineGone: nobody listens within ``appear_s``, the engine ended before it was ready, or ``timeout_s`` is over.
        ConfigError: the socket is not one of this user's engines, or the engine speaks another protocol.
    """
    deadline = time.monotonic() + timeout_s
    connected = _find(path, min(deadline, time.monotonic() + appear_s))
    try:
        connection = Connection(connected, client_framer())
        poller = select.poll()
        poller.register(connected, select.POLLIN)
        connection.send_frame(hello("client"))
        return Opened(connection, connected, poller, _wait(connection, poller, on_start, deadline, timeout_s))
    except ProtocolError as error:
        connected.close()
        raise EngineGone(f"the engine process was not ready: {loss(error)}") from None
    except BaseException:
        connected.close()
        raise


def _wait(
    connection: Connection[FromEngine],
    poller: select.poll,
    on_start: Callable[[StartPhase], None] | None,
    deadline: float,
    timeout_s: float,
) -> Ready:
    ready: Ready | None = None
    while True:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise EngineGone(f"the engine process was not ready after {timeout_s:g} s")
        if not poller.poll(left_s * 1e3):
            continue
        for record in connection.receive():
            if isinstance(record, Ready):
                return record
            if isinstance(record, Beat) and ready is not None:
                return ready
            if isinstance(record, Welcome):
                ready = welcomed(record)
            elif isinstance(record, StartPhase) and on_start is not None:
                on_start(record)
            elif isinstance(record, Goodbye):
                raise EngineGone(record.reason)


def _find(path: Path, deadline: float) -> socket:
    """A socket connected to the engine at ``path``; waits until somebody listens."""
    check_path(path)
    while True:
        try:
            return connect(path, 0.0)
        except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
            if time.monotonic() >= deadline:
                raise EngineGone(nobody_there(path)) from None
        except OSError as error:
            raise ConfigError(f"{path} cannot be connected to: {error.strerror}") from None
        time.sleep(_LOOK_AGAIN_S)
