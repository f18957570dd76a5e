"""Pages of other origins: which of them a browser lets use this server. Pure.

By default none. What is allowed is said to the browser, which keeps to it; keys that it would add by itself are never
allowed, so such a page sends the key as ``Bearer``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from jitgraph.errors import ConfigError

ANY = "*"
_ORIGIN = re.compile(r"https?://[^/\s,]+")
_HEADER_NAMES = re.compile(rb"[A-Za-z0-9 ,_-]{1,1024}")
_REMEMBER_S = 600

Headers = list[tuple[bytes, bytes]]


class Cors:
    """The origins whose pages may use the server.

    Raises:
        ConfigError: what is no origin.
    """

    def __init__(self, origins: Collection[str]) -> None:
        for origin in origins:
            if origin != ANY and not _ORIGIN.fullmatch(origin):
                raise ConfigError(f"--allowed-origin must be like https://host:port, or *, not {origin!r}")
        self._any = ANY in origins
        self._origins = frozenset(origin.encode() for origin in origins)

    def headers(self, request: Mapping[bytes, bytes]) -> Headers:
        """What an answer to a request carries; nothing where its page is of this server or not allowed."""
        if not self._origins:
            return []
        vary: Headers = [] if self._any else [(b"vary", b"origin")]
        origin = request.get(b"origin")
        if origin is None or not (self._any or origin in self._origins):
            return vary
        exposed = (b"access-control-expose-headers", b"x-request-id, retry-after")
        return [(b"access-control-allow-origin", b"*" if self._any else origin), exposed, *vary]

    def preflight(self, method: str, request: Mapping[bytes, bytes]) -> Headers | None:
        """The answer to a browser that asks whether a page may send what it wants to; None where it asks something else
        or the page may not."""
        if method != "OPTIONS" or b"access-control-request-method" not in request:
            return None
        found = self.headers(request)
        if not any(name == b"access-control-allow-origin" for name, _ in found):
            return None
        wanted = request.get(b"access-control-request-headers", b"")
        if _HEADER_NAMES.fullmatch(wanted):
            found.append((b"access-control-allow-headers", wanted))
        found.append((b"access-control-allow-methods", b"GET, POST"))
        return [*found, (b"access-control-max-age", b"%d" % _REMEMBER_S), (b"content-length", b"0")]
