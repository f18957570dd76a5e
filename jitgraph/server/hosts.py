"""The names under which this server may be asked, where no key protects it. Pure.

A page of any site can have its own name lead to this machine after it was loaded (DNS rebinding): its requests are of
one origin then, and no browser stops them. They carry the page's name, by which they are told.
"""

from __future__ import annotations

from collections.abc import Collection

from jitgraph.server.address import is_loopback
from jitgraph.server.openai.errors import ApiError

ANY = "*"


class Hosts:
    """Names that may be asked for, besides this machine's own (``localhost``, 127.0.0.0/8, ``::1``); without any, or
    with ``*``, every name."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(name.strip("[]").rstrip(".").lower() for name in names)
        self._any = not names or ANY in names

    def check(self, host: bytes | None) -> None:
        """Refuses a ``Host`` header with another name. Without the header it was no browser.

        Raises:
            ApiError: 403 ``unknown_host``.
        """
        if self._any or host is None:
            return
        name = _name(host.decode("latin-1"))
        if name not in self._names and not is_loopback(name):
            why = f"this server is not known as {name!r:.100}: ask for it as localhost, or start it with --allowed-host"
            raise ApiError(403, why, None, "unknown_host")


def _name(host: str) -> str:
    """The name in a ``Host`` header, without port, brackets and the dot at its end."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].rstrip(".")
