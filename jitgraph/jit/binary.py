"""A compiled specialisation, and its form on disk.

On disk: three parts, each after its length: what a launch needs as JSON, the cubin, the PTX (deflated). What the reader
asked for (kernel, signature, architecture) is not in there: the key stands for it.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass, field
from typing import Any

from jitgraph.jit.cubin import resource_use
from jitgraph.jit.specialise import Specialisation

_WARP_SIZE = 32
_LENGTH = struct.Struct("<Q")
_ELF = b"\x7fELF"


@dataclass(frozen=True)
class Binary:
    """A compiled specialisation and what a launch of it needs."""

    kernel: str
    """Qualified name of the body."""
    symbol: str
    """Its name in the cubin."""
    arch: int
    signature: str
    """Argument types, constants and options, readable."""
    argument_types: tuple[str, ...]
    num_warps: int
    num_ctas: int
    shared_bytes: int
    """Dynamic shared memory per block."""
    scratch_bytes: int
    """Global scratch per block that Triton asks the launcher for; 0 for all but on-device tensor descriptors."""
    launch_pdl: bool
    cooperative: bool
    registers: int | None
    """Per thread."""
    local_bytes: int | None
    """Stack per thread; above 0 means spills or run-time indexed arrays."""
    ms: float
    """Host milliseconds that it took to compile, or to read from the disk cache."""
    cubin: bytes = field(repr=False)
    ptx: str = field(repr=False)

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.num_warps * _WARP_SIZE


_INTEGERS = ("num_warps", "num_ctas", "shared_bytes", "scratch_bytes")
_FLAGS = ("launch_pdl", "cooperative")


def encode_binary(binary: Binary) -> bytes:
    """The form on disk."""
    facts = {name: getattr(binary, name) for name in ("symbol", *_INTEGERS, *_FLAGS)}
    parts = (json.dumps(facts).encode(), binary.cubin, zlib.compress(binary.ptx.encode(), 1))
    return b"".join(_LENGTH.pack(len(part)) + part for part in parts)


def decode_binary(payload: bytes, kernel: str, spec: Specialisation, arch: int, ms: float) -> Binary:
    """A binary from its form on disk; ``kernel``, ``spec`` and ``arch`` are what was asked for.

    Raises:
        ValueError: this is no binary.
    """
    try:
        text, cubin, ptx = _parts(payload)
        return _binary(json.loads(text), cubin, zlib.decompress(ptx).decode(), kernel, spec, arch, ms)
    except (KeyError, TypeError, struct.error, zlib.error) as error:
        raise ValueError(f"not a compiled kernel: {error}") from error


def _parts(payload: bytes) -> list[bytes]:
    parts, offset = [], 0
    for _ in range(3):
        (length,) = _LENGTH.unpack_from(payload, offset)
        offset += _LENGTH.size
        parts.append(payload[offset : offset + length])
        offset += length
    if offset != len(payload):
        raise ValueError("the lengths of its parts do not add up")
    return parts


def _binary(facts: Any, cubin: bytes, ptx: str, kernel: str, spec: Specialisation, arch: int, ms: float) -> Binary:
    sound = type(facts["symbol"]) is str and cubin.startswith(_ELF)
    sound = sound and all(type(facts[name]) is int and facts[name] >= 0 for name in _INTEGERS)
    sound = sound and all(type(facts[name]) is bool for name in _FLAGS)
    if not sound:
        raise ValueError("not a compiled kernel: a fact of the wrong kind")
    use = resource_use(cubin)
    return Binary(
        kernel=kernel,
        symbol=facts["symbol"],
        arch=arch,
        signature=spec.describe(),
        argument_types=spec.argument_types,
        registers=use.registers,
        local_bytes=use.local_bytes,
        ms=ms,
        cubin=cubin,
        ptx=ptx,
        **{name: facts[name] for name in (*_INTEGERS, *_FLAGS)},
    )
