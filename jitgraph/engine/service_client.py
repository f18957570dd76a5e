"""One connection of an engine process as its hub keeps it, and what a hub needs of whoever makes something of it."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator
from typing import Protocol

from jitgraph.ipc.messages import EngineFacts, FromClient
from jitgraph.ipc.sockets import Connection


class Client:
    """One connection."""

    __slots__ = (
        "connection",
        "here",
        "name",
        "opened_s",
        "pid",
        "records",
        "requests",
        "until_s",
        "welcomed",
        "writing",
    )

    def __init__(self, connection: Connection[FromClient], pid: int) -> None:
        self.connection = connection
        self.pid = pid
        self.here = True
        """Whether it is a client still: nothing it says is heard any more otherwise."""
        self.until_s = 0.0
        """How long one that was sent away may take to read why."""
        self.name = ""
        self.opened_s = time.monotonic()
        self.welcomed = False
        """Whether it has said hello in the right version."""
        self.records: Iterator[FromClient] | None = None
        """What has arrived and was too much for one look."""
        self.writing = False
        """Whether the poller watches for room to write."""
        self.requests: dict[int, int] = {}
        """Its running requests: the engine's id by the client's own."""


class Handler(Protocol):
    """Who makes something of what clients say."""

    @property
    def facts(self) -> EngineFacts | None:
        """For ``Welcome``: None until the engine is ready."""

    def joined(self, client: Client) -> None:
        """A client has been welcomed."""

    def hear(self, client: Client, record: FromClient) -> None:
        """A record of a welcomed client. Raises ``ProtocolError`` where it should not have been sent."""

    def behind(self, client: Client, owner: Hashable) -> None:
        """A client leaves too much unread, most of it this owner's: its frames must be taken back."""

    def left(self, client: Client) -> None:
        """A client is gone, or was sent away; nothing can be sent to it any more."""
