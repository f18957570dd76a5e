"""Values as bytes, so that they can be part of a hash: different values, and equal ones of different types, give
different bytes.

Pure. Takes what can be compiled into a kernel: None, numbers, text, tuples of these, Triton's types and constants.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from triton.language.core import constexpr, dtype


def canonical(value: object) -> bytes:
    """The bytes of a value: a letter for its type, its length or size, its content.

    Raises:
        TypeError: a value of another type, which has no bytes that would be the same in another process.
    """
    kind = type(value)
    if value is None:
        return b"n"
    if kind is bool:
        return b"t" if value else b"f"
    if kind is int:
        return _sized(b"i", str(value).encode())
    if isinstance(value, float) and kind is float:
        return b"r" + struct.pack(">d", value)
    if isinstance(value, str) and kind is str:
        return _sized(b"s", value.encode("utf-8", "surrogatepass"))
    if isinstance(value, bytes) and kind is bytes:
        return _sized(b"b", value)
    if isinstance(value, (tuple, list)):
        return _sized(b"l", canonical(_name(kind)) + b"".join(_sized(b"", canonical(item)) for item in value))
    if isinstance(value, Mapping):
        return _sized(b"m", b"".join(sorted(_sized(b"", canonical(item)) for item in value.items())))
    if isinstance(value, constexpr):
        return _sized(b"c", canonical(value.value))
    if isinstance(value, dtype):
        return _sized(b"d", canonical((_name(kind), str(value))))
    raise TypeError(f"a value of {_name(kind)} cannot be part of a key")


def _sized(letter: bytes, content: bytes) -> bytes:
    return letter + str(len(content)).encode() + b":" + content


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
