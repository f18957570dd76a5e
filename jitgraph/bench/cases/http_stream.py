"""One streaming client for every case that is a server at a URL: OpenAI's completions, by Python's own HTTP library.

One connection, kept open, on the case's main thread. While an answer streams, lines are only cut and dated; what they
say is read after the last one, so that reading costs no time between two tokens. Needs no package but Python's own.
"""

from __future__ import annotations

import http.client
import json
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from jitgraph.errors import JitgraphError

BLOCK_BYTES = 65536
END = b"[DONE]"


class ServerError(JitgraphError):
    """A server that answered with an error; ``code`` is its HTTP status, ``text`` what it said."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"the server answered {code}: {text[:300]}")
        self.code, self.text = code, text


@dataclass(frozen=True)
class Piece:
    """One event of a stream that carries tokens."""

    time_ns: int
    """``time.perf_counter_ns`` when its last byte was here."""
    token_ids: tuple[int, ...] | None
    """None where the server does not tell ids."""
    text: str


@dataclass(frozen=True)
class Streamed:
    """One whole answer."""

    start_ns: int
    """When the request was handed to the system."""
    pieces: tuple[Piece, ...]
    usage: Mapping[str, Any]
    """Empty where the server does not tell."""


class StreamClient:
    """A connection to one server."""

    def __init__(self, url: str, key: str | None, timeout_s: float = 120.0) -> None:
        """``url``: the server's address, with or without ``/v1``; a ``#NAME`` at its end names the model."""
        self._parts: SplitResult = urlsplit(url)
        self.model = unquote(self._parts.fragment)
        path = self._parts.path.rstrip("/")
        self.base = path if path else "/v1"
        self._headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._timeout_s = timeout_s
        self._connection = self._new_connection()

    @property
    def place(self) -> str:
        """The address without the model's name, a user name or a password."""
        host = self._parts.hostname or ""
        port = f":{self._parts.port}" if self._parts.port else ""
        return f"{self._parts.scheme}://{host}{port}{self.base}"

    def _new_connection(self) -> http.client.HTTPConnection:
        host, port = self._parts.hostname or "", self._parts.port
        if self._parts.scheme == "https":
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(host, port, timeout=self._timeout_s, context=context)
        return http.client.HTTPConnection(host, port, timeout=self._timeout_s)

    def models(self) -> list[str]:
        """Names of the models that are served.

        Raises:
            ServerError: an answer that is no success.
            OSError: nobody answers there.
        """
        response = self._send("GET", f"{self.base}/models", None)
        body = response.read()
        self._check(response.status, body)
        return [str(one["id"]) for one in json.loads(body)["data"]]

    def stream(self, fields: Mapping[str, Any]) -> Streamed:
        """Asks for a completion with these fields and reads it to its end.

        Raises:
            ServerError: an answer that is no success, or an error in the middle of a stream.
            OSError: the connection broke, or nothing came for longer than the time limit.
        """
        body = json.dumps({**fields, "stream": True}).encode()
        self._open()
        start = time.perf_counter_ns()
        response = self._send("POST", f"{self.base}/completions", body)
        if response.status != 200:
            self._check(response.status, response.read())
        lines = _dated_lines(response)
        return Streamed(start, *_read(lines))

    def _open(self) -> None:
        """Connects where the last answer closed the connection: no request pays for that."""
        if self._connection.sock is None:
            self._connection.connect()

    def _send(self, method: str, path: str, body: bytes | None) -> http.client.HTTPResponse:
        try:
            self._connection.request(method, path, body, self._headers)
            return self._connection.getresponse()
        except (http.client.HTTPException, OSError):
            self._connection.close()
            raise

    @staticmethod
    def _check(status: int, body: bytes) -> None:
        if status != 200:
            raise ServerError(status, body.decode("utf-8", "replace").strip())

    def close(self) -> None:
        """Ends the connection."""
        self._connection.close()


def _dated_lines(response: http.client.HTTPResponse) -> list[tuple[int, bytes]]:
    """(clock, payload) of every event, in order."""
    found: list[tuple[int, bytes]] = []
    rest = b""
    while block := response.read1(BLOCK_BYTES):
        now = time.perf_counter_ns()
        *lines, rest = (rest + block).split(b"\n")
        found += [(now, line[5:].strip()) for line in lines if line.startswith(b"data:")]
    return found


def _read(lines: list[tuple[int, bytes]]) -> tuple[tuple[Piece, ...], Mapping[str, Any]]:
    pieces: list[Piece] = []
    usage: Mapping[str, Any] = {}
    for time_ns, payload in lines:
        if payload == END:
            break
        event = json.loads(payload)
        if "error" in event:
            raise ServerError(200, json.dumps(event["error"]))
        usage = event.get("usage") or usage
        for choice in event.get("choices") or ():
            ids, text = choice.get("token_ids"), choice.get("text") or ""
            if ids or text:
                pieces.append(Piece(time_ns, None if ids is None else tuple(ids), text))
    return tuple(pieces), usage
