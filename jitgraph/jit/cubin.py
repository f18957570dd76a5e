"""Reads register and local-memory use out of a cubin, without a GPU or NVIDIA's tools.

A cubin is a 64-bit ELF file. Its section ``.nv.info`` is a list of attributes: one byte of format, one byte of kind,
two bytes of size, then (for the sized format) the payload; the ones wanted here hold a symbol index and a 32-bit
value. Checked against ``cuobjdump -res-usage``, which names the same figures REG and STACK.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

_SIZED = 4
_FRAME_SIZE = 0x11
_REGCOUNT = 0x2F
_SHORT_VALUE_FORMATS = (1, 2, 3)


class ResourceUse(NamedTuple):
    """Per thread; None where the cubin does not say."""

    registers: int | None
    local_bytes: int | None
    """Stack frame: register spills and arrays that are indexed at run time."""


def resource_use(cubin: bytes) -> ResourceUse:
    """Resources of the only kernel of a cubin (the largest, should there be several)."""
    found: dict[int, int] = {}
    info = _section(cubin, b".nv.info")
    offset = 0
    while offset + 4 <= len(info):
        form, kind, size = struct.unpack_from("<BBH", info, offset)
        offset += 4
        if form in _SHORT_VALUE_FORMATS:
            continue
        if form != _SIZED:
            break
        if kind in (_FRAME_SIZE, _REGCOUNT) and size == 8:
            found[kind] = max(found.get(kind, 0), struct.unpack_from("<II", info, offset)[1])
        offset += size
    return ResourceUse(found.get(_REGCOUNT), found.get(_FRAME_SIZE))


def _section(elf: bytes, wanted: bytes) -> bytes:
    """Contents of a named section; empty where there is none."""
    if elf[:5] != b"\x7fELF\x02":
        return b""
    table_offset = struct.unpack_from("<Q", elf, 0x28)[0]
    entry_size, count, names_index = struct.unpack_from("<HHH", elf, 0x3A)
    headers = []
    for index in range(count):
        name, _, _, _, offset, size = struct.unpack_from("<IIQQQQ", elf, table_offset + index * entry_size)
        headers.append((name, offset, size))
    names = headers[names_index][1]
    for name, offset, size in headers:
        start = names + name
        if elf[start : elf.index(b"\0", start)] == wanted:
            return elf[offset : offset + size]
    return b""
