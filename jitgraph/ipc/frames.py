"""Records to bytes and back: a four-byte little-endian length, then msgpack.

Whatever arrives, ``Framer.feed`` returns whole, valid records or raises ``ProtocolError``; it never holds more than one
frame's cap beyond what it was fed, and nothing once it has raised. Whoever owns the connection calls, from one thread.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import msgspec

from jitgraph.errors import JitgraphError
from jitgraph.ipc.messages import FromClient, FromEngine, Message

MAX_FRAME_BYTES = 16 * 2**20
"""Largest payload; a prompt of a million tokens takes 4 MB."""
MAX_GREETING_BYTES = 4096
"""Largest payload of a connection's first record: its name has at most 256 characters."""
_LENGTH = struct.Struct("<I")

T = TypeVar("T")


class ProtocolError(Exception):
    """The other side does not keep to the protocol: the connection is of no use any more."""


_ENCODER = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    """One record as a frame.

    Raises:
        ProtocolError: it is too large, or holds what msgpack cannot express (half a surrogate pair, an integer of over
            64 bits).
    """
    try:
        payload = _ENCODER.encode(message)
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError, OverflowError) as error:
        raise ProtocolError(f"a {type(message).__name__} record cannot be encoded: {error}") from error
    if len(payload) > MAX_FRAME_BYTES:
        raise ProtocolError(f"a record of {len(payload)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(payload)) + payload


class Framer(Generic[T]):
    """Cuts a stream of bytes into records of one direction."""

    def __init__(self, kinds: Any, most: int = MAX_FRAME_BYTES) -> None:
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(kinds, strict=True)
        self.most = most
        """Largest payload of the frames that are not complete yet."""
        self._buffer = bytearray()
        self._broken = ""

    def feed(self, data: bytes) -> Iterator[T]:
        """The records that are complete with these bytes, in order; to be consumed before the next call.

        Raises:
            ProtocolError: a frame over the limit, or one that is no valid record; and so does every later call.
        """
        if self._broken:
            raise ProtocolError(self._broken)
        buffer = self._buffer
        buffer += data
        at = 0
        try:
            while len(buffer) - at >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(buffer, at)
                if length > self.most:
                    raise ProtocolError(f"a frame of {length} bytes is over the limit of {self.most}")
                begin = at + _LENGTH.size
                if len(buffer) < begin + length:
                    break
                at = begin + length
                yield self._decode(bytes(buffer[begin:at]))
        except ProtocolError as error:
            self._broken = str(error)
            at = len(buffer)
            raise
        finally:
            del buffer[:at]

    def _decode(self, payload: bytes) -> T:
        try:
            return self._decoder.decode(payload)
        except (msgspec.MsgspecError, JitgraphError, ValueError, TypeError, RecursionError, OverflowError) as error:
            # a JitgraphError comes from records that check themselves, such as the parameters in ``EngineFacts``
            raise ProtocolError(f"not a record of this protocol: {error}") from error

    @property
    def partial(self) -> bool:
        """Whether a frame has begun and not ended."""
        return bool(self._buffer)

    @property
    def held(self) -> int:
        """Bytes kept of the frame that has begun and not ended."""
        return len(self._buffer)


def client_framer() -> Framer[FromEngine]:
    """Reads what an engine sends."""
    return Framer(FromEngine)


def engine_framer() -> Framer[FromClient]:
    """Reads what clients send."""
    return Framer(FromClient)
