"""Keeps Triton's own disk cache out of our compilations, and ours out of the caches of others.

Triton trusts whatever lies in its cache folder, and fails where it cannot write there. Inside ``private_cache()`` the
calling thread's compilations see a new, empty folder instead, which is deleted afterwards. Other threads compile as the
user set Triton up, also while a block is open; when the last one closes, Triton's settings are what they were.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import triton
from triton.runtime.cache import CacheManager, FileCacheManager

_FOLDER: ContextVar[str | None] = ContextVar("jitgraph_triton_folder", default=None)


class _EmptyCache(CacheManager):  # type: ignore[misc]
    """Triton's interface to a cache that has nothing and keeps its files in one folder."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def get_file(self, filename: str) -> str | None:
        path = os.path.join(self._folder, filename)
        return path if os.path.exists(path) else None

    def put(self, data: Any, filename: str, binary: bool = True) -> str:
        path = os.path.join(self._folder, filename)
        content = data if isinstance(data, bytes) else str(data).encode()
        with open(path, "wb") as file:
            file.write(content)
        return path

    def get_group(self, filename: str) -> dict[str, str] | None:
        return None

    def put_group(self, filename: str, group: dict[str, str]) -> None:
        pass


class _Switch:
    """Triton's choice of cache, ours for the threads inside a block and the user's for all others."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open_blocks = 0
        self._was_set = False
        self._before: Any = None

    def __call__(self, key: str, **kind: bool) -> CacheManager:
        """Stands for the class of Triton's cache; ``kind`` says ``override`` or ``dump``, which stay the user's."""
        folder = _FOLDER.get()
        if folder is not None and not any(kind.values()):
            return _EmptyCache(folder)
        return (self._before or FileCacheManager)(key, **kind)

    def enter(self) -> None:
        """Puts this in place of the user's choice."""
        knobs = triton.knobs.cache
        with self._lock:
            self._open_blocks += 1
            if knobs.__dict__.get("manager_class") is not self:
                self._was_set = "manager_class" in knobs.__dict__
                self._before = knobs.manager_class
                knobs.manager_class = self

    def leave(self) -> None:
        """Puts the user's choice back, at the end of the last block, unless the user has made another one."""
        knobs = triton.knobs.cache
        with self._lock:
            self._open_blocks -= 1
            if self._open_blocks or knobs.__dict__.get("manager_class") is not self:
                return
            if self._was_set:
                knobs.manager_class = self._before
            else:
                del knobs.manager_class


_SWITCH = _Switch()


@contextmanager
def private_cache() -> Iterator[None]:
    """Inside the block, this thread's compilations find no cached result and leave none.

    Raises:
        OSError: there is no folder for temporary files.
    """
    with tempfile.TemporaryDirectory(prefix="jitgraph-", ignore_cleanup_errors=True) as folder:
        token = _FOLDER.set(folder)
        _SWITCH.enter()
        try:
            yield
        finally:
            _SWITCH.leave()
            _FOLDER.reset(token)
