"""Compiled kernels on disk: small files that are checked whenever they are read, and that nothing depends on.

Any thread and any number of processes may use a folder at once. An entry is written beside its place and moved there in
one step, so a reader sees all of it or nothing. An entry that is damaged, cut short, foreign, of another format or
under another key's name counts as absent, and the next ``put`` takes its place. Where the folder cannot be written or
read, everything still works, and each ``put`` says so.

An entry: magic, format, key, length and SHA-256 of the payload, then the payload.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import stat
import struct
import threading
import time
from contextlib import suppress
from enum import Enum
from functools import lru_cache
from pathlib import Path

from jitgraph import config

CACHE_FORMAT = 1
"""Raised when the form of entries, or what goes into their keys, changes."""
LIMIT_BYTES = 512 * 2**20
"""Size of a folder above which the entries that were not used for the longest time are deleted."""

_MAGIC = b"jitgraph"
_HEADER = struct.Struct("<8sI32sQ32s")
_ENTRY = re.compile(r"[0-9a-f]{64}\.kernel")
_TEMPORARY = re.compile(r"\.[0-9a-f]{64}\.[0-9a-f]+\.tmp")
_ABANDONED_S = 3600.0  # no write takes that long, so a temporary file of this age is what a crash left


class Lookup(Enum):
    """How a look into the cache ended."""

    HIT = "hit"
    MISSING = "missing"
    DAMAGED = "damaged"
    """There is something, but nothing that can be trusted."""
    BYPASSED = "bypassed"
    """Not looked: something is compiled in whose value no key can hold, or a Triton debugging switch is set."""


class DiskCache:
    """One folder of entries; keys are 32 bytes."""

    def __init__(self, folder: str | os.PathLike[str], limit_bytes: int = LIMIT_BYTES) -> None:
        self.folder = Path(folder)
        self.limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._unchecked_bytes = limit_bytes  # the first write looks at the folder's size

    def path(self, key: bytes) -> Path:
        """Where the entry of a key lies, if it exists."""
        return self.folder / f"{key.hex()}.kernel"

    def get(self, key: bytes) -> tuple[Lookup, bytes]:
        """The payload stored under ``key``, or the reason why there is none; it then counts as used now."""
        try:
            # Without blocking, in case somebody put a pipe there.
            handle = os.open(self.path(key), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return Lookup.MISSING, b""
        try:
            payload = _read_entry(handle, key)
            with suppress(OSError):
                os.utime(handle)
        except (OSError, ValueError):
            return Lookup.DAMAGED, b""
        finally:
            os.close(handle)
        return Lookup.HIT, payload

    def put(self, key: bytes, payload: bytes) -> bool:
        """Stores a payload in place of whatever is there; False where the folder cannot be written."""
        header = _HEADER.pack(_MAGIC, CACHE_FORMAT, key, len(payload), hashlib.sha256(payload).digest())
        temporary = self.folder / f".{key.hex()}.{secrets.token_hex(8)}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_new(temporary, header + payload)
            try:
                os.replace(temporary, self.path(key))
            except BaseException:
                _unlink(temporary)
                raise
        except OSError:
            return False
        self._note_written(len(payload))
        return True

    def prune(self) -> int:
        """Deletes what crashes left and, above the limit, the entries least recently used; returns their number."""
        entries = []
        with suppress(OSError), os.scandir(self.folder) as items:
            for item in items:
                with suppress(OSError):  # another process prunes as well
                    status = item.stat(follow_symlinks=False)
                    if _ENTRY.fullmatch(item.name) and stat.S_ISREG(status.st_mode):
                        entries.append((status.st_mtime_ns, item.name, status.st_size))
                    elif _TEMPORARY.fullmatch(item.name) and time.time() - status.st_mtime > _ABANDONED_S:
                        _unlink(item.path)
        total, removed = sum(size for _, _, size in entries), 0
        goal = self.limit_bytes if total <= self.limit_bytes else self.limit_bytes * 3 // 4
        for _, name, size in sorted(entries):
            if total <= goal:
                break
            _unlink(self.folder / name)
            total -= size
            removed += 1
        return removed

    def _note_written(self, size: int) -> None:
        with self._lock:
            self._unchecked_bytes += size
            if self._unchecked_bytes < self.limit_bytes // 16:
                return
            self._unchecked_bytes = 0
        self.prune()


def open_cache() -> DiskCache:
    """The cache below ``config.cache_dir()``; one object for each folder."""
    return _cache_in(os.path.join(config.cache_dir(), "kernels"))


@lru_cache
def _cache_in(folder: str) -> DiskCache:
    return DiskCache(folder)


def _read_entry(handle: int, key: bytes) -> bytes:
    """The payload of an open entry.

    Raises:
        ValueError: it is not what was stored under ``key``.
        OSError: it cannot be read.
    """
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or status.st_size < _HEADER.size:
        raise ValueError("not an entry")
    with os.fdopen(handle, "rb", closefd=False) as file:
        magic, form, stored_key, length, digest = _HEADER.unpack(file.read(_HEADER.size))
        if (magic, form, stored_key, length) != (_MAGIC, CACHE_FORMAT, key, status.st_size - _HEADER.size):
            raise ValueError("another entry, or a damaged one")
        payload = file.read(length)
    if hashlib.sha256(payload).digest() != digest:
        raise ValueError("damaged payload")
    return payload


def _write_new(path: Path, content: bytes) -> None:
    """Writes a file that does not exist yet, or leaves none."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
    except BaseException:
        _unlink(path)
        raise


def _unlink(path: str | os.PathLike[str]) -> None:
    with suppress(OSError):
        os.unlink(path)
