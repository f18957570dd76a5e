"""API keys: who may ask, compared in constant time. Pure.

A key comes as ``Authorization: Bearer KEY``, or as the password of ``Basic`` with any name, which is what a browser
asks its user for and then sends by itself.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from jitgraph.server.openai.errors import ApiError

ANONYMOUS = "anonymous"
"""The name of callers where no key is wanted."""


@dataclass(frozen=True)
class Caller:
    """Who asks."""

    name: str
    """``key-1`` for the first key, and so on: for logs and metrics, never the key itself."""
    salt: str
    """Keeps the cached prompts of one key from being noticed by another."""


class Keys:
    """The keys that open the server; without any, everybody may ask."""

    def __init__(self, keys: Sequence[str]) -> None:
        # Digests under a random key: all have one length, and nothing about a key shows in the time of a comparison.
        self._secret = secrets.token_bytes(32)
        self._callers = [
            (self._digest(key.encode()), Caller(f"key-{i}", self._digest(b"salt " + key.encode()).hex()))
            for i, key in enumerate(keys, start=1)
        ]

    def _digest(self, key: bytes) -> bytes:
        return hmac.digest(self._secret, key, "sha256")

    def caller(self, authorization: bytes | None) -> Caller:
        """Whose key an ``Authorization`` header holds. Every key is compared, whichever fits.

        Raises:
            ApiError: 401 ``invalid_api_key``.
        """
        if not self._callers:
            return Caller(ANONYMOUS, "")
        given = _key_in(authorization or b"")
        digest = self._digest(given)
        found = [caller for own, caller in self._callers if hmac.compare_digest(own, digest)]
        if not found:
            what = "the API key is wrong" if given else "an API key is needed: send it as Authorization: Bearer KEY"
            raise ApiError(401, what, None, "invalid_api_key")
        return found[0]


def is_basic(authorization: bytes | None) -> bool:
    """Whether the header is of the kind that browsers send without being asked each time."""
    return authorization is not None and authorization[:6].lower() == b"basic "


def _key_in(authorization: bytes) -> bytes:
    """The key in an ``Authorization`` header; empty where there is none."""
    scheme, _, rest = authorization.partition(b" ")
    if scheme.lower() == b"bearer":
        return rest.strip()
    if scheme.lower() != b"basic":
        return b""
    try:
        return base64.b64decode(rest.strip(), validate=True).partition(b":")[2]
    except binascii.Error:
        return b""
