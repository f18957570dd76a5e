"""What every request passes first: caps on its head, the API key, a request id, and at last its record.

An ASGI middleware, event loop's thread.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Collection
from typing import Any

from jitgraph.server import page
from jitgraph.server.auth import ANONYMOUS, Caller, Keys, is_basic
from jitgraph.server.cors import Cors
from jitgraph.server.exchange import Receive, Scope, Send, discard_body
from jitgraph.server.hosts import Hosts
from jitgraph.server.openai.errors import ApiError
from jitgraph.server.records import RequestRecord
from jitgraph.server.service import Passage
from jitgraph.server.settings import ServerSettings
from jitgraph.types import FinishReason

LOGGER = logging.getLogger("jitgraph.server")

OPEN_PATHS = ("/health", "/ready")
"""What needs no key."""
UNRECORDED = ("/health", "/ready", "/metrics", page.STATE_PATH, *page.FILE_PATHS)
"""Asked for every few seconds by machines, or no work."""
_NOBODY = Caller(ANONYMOUS, "")
_ASK_USER = b'Basic realm="jitgraph: any name, the API key as password", charset="UTF-8"'
_OWN_PAGES = (b"same-origin", b"none")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


class Gate:
    """Wraps the whole application. On ``browser_paths`` a browser is told to ask its user for the key."""

    def __init__(self, app: Any, settings: ServerSettings, browser_paths: Collection[str] = ()) -> None:
        self._app = app
        self._browser_paths = frozenset(browser_paths)
        self._settings = settings
        self._keys = Keys(settings.api_keys)
        self._hosts = Hosts(() if settings.api_keys else settings.allowed_hosts)
        self._cors = Cors(settings.allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI call."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1003})
            else:
                await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        identity = _request_id(headers.get(b"x-request-id"))
        passage = Passage(RequestRecord(identity.decode(), "other", client=ANONYMOUS), _NOBODY, headers)
        status, allowed = 0, self._cors.headers(headers)

        async def send_with_id(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", identity), *allowed]
            await send(message)

        try:
            try:
                self._check_head(scope)
                self._hosts.check(headers.get(b"host"))
                if (preflight := self._cors.preflight(scope["method"], headers)) is not None:
                    await send({"type": "http.response.start", "status": 204, "headers": preflight})
                    await send({"type": "http.response.body", "body": b""})
                    status = 204
                    return
                passage.caller = self._caller(scope, headers)
            except ApiError as error:
                passage.record.error_kind = error.name
                await discard_body(receive)
                await _answer(send_with_id, error)
                return
            passage.record.client = passage.caller.name
            await self._app({**scope, "jitgraph": passage}, receive, send_with_id)
        finally:
            self._done(scope["path"], passage, status)

    def _check_head(self, scope: Scope) -> None:
        headers, settings = scope["headers"], self._settings
        if len(headers) > settings.max_headers:
            raise ApiError(431, f"{len(headers)} headers; {settings.max_headers} are possible", None, "head_too_large")
        size = sum(len(name) + len(value) + 4 for name, value in headers)
        size += len(scope.get("raw_path") or b"") + len(scope.get("query_string") or b"")
        if size > settings.max_header_bytes:
            most = settings.max_header_bytes
            raise ApiError(431, f"the headers have {size} bytes; {most} are possible", None, "head_too_large")

    def _caller(self, scope: Scope, headers: dict[bytes, bytes]) -> Caller:
        if scope["path"] in OPEN_PATHS:
            return _NOBODY
        authorization = headers.get(b"authorization")
        try:
            caller = self._keys.caller(authorization)
        except ApiError as error:
            if scope["path"] in self._browser_paths:
                error.challenge = _ASK_USER
            raise
        site = headers.get(b"sec-fetch-site", b"none")
        foreign = caller.salt and is_basic(authorization) and site not in _OWN_PAGES
        if foreign and scope["method"] not in ("GET", "HEAD"):
            # The browser adds what it knows by itself, whoever made the page that asks.
            raise ApiError(403, "a page of another site must send the key itself", None, "cross_site")
        return caller

    def _done(self, path: str, passage: Passage, status: int) -> None:
        record, hook = passage.record, self._settings.on_request_done
        if passage.left:
            for sequence in record.sequences:
                if sequence.finish_reason is None:
                    sequence.finish_reason = FinishReason.CANCELLED.value
        record.finish(status, record.error_kind)
        if hook is None or path in UNRECORDED:
            return
        try:
            hook(record)
        except Exception:
            LOGGER.exception("the hook for finished requests failed")


def _request_id(given: bytes | None) -> bytes:
    """The client's own, where it is harmless in headers and logs; else a new one. Nothing is ever looked up by it."""
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given
    return secrets.token_hex(16).encode()


async def _answer(send: Send, error: ApiError) -> None:
    body = error.encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *error.headers]
    # There may be more of the request than was read, so the connection is of no more use.
    headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
