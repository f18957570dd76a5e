"""The key under which a compiled specialisation lies on disk.

A hash over everything that decides about the result: the kernel's sources, the specialisation with the types of its
constants, the options as Triton completes them, the architecture, and the tool chain: Triton with its compiler library,
ptxas, libdevice, and the switches that Triton counts into its own keys.
"""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import triton
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.runtime.cache import triton_key

from jitgraph.jit.canonical import canonical
from jitgraph.jit.disk_cache import CACHE_FORMAT, DiskCache, Lookup
from jitgraph.jit.source_digest import source_digest
from jitgraph.jit.specialise import Specialisation


def kernel_key(jit_function: Any, spec: Specialisation, backend: Any, options: Any, cache: DiskCache) -> bytes | None:
    """32 bytes; None for what may not be cached: a constant that has no canonical form, or a debugging switch is set.

    ``options``: complete, as Triton's ``backend`` parsed them. ``cache`` remembers the hash of the tool chain.
    """
    knobs = triton.knobs
    inspected = knobs.compilation.override or knobs.compilation.dump_ir or knobs.compilation.always_compile
    if inspected or getattr(knobs.runtime, "add_stages_inspection_hook", None) is not None:
        return None
    try:
        parts = canonical(
            (
                "triton",
                CACHE_FORMAT,
                toolchain(cache),
                backend.hash(),
                options.hash(),
                sorted(get_cache_invalidating_env_vars().items()),
                backend.target.arch,
                source_digest(jit_function),
                spec.types,
                spec.constants,
                spec.divisible,
                spec.options,
            )
        )
    except TypeError:
        return None
    return hashlib.sha256(parts).digest()


def toolchain(cache: DiskCache) -> str:
    """Triton's own hash of itself.

    It reads some hundred megabytes. So the result is kept in the cache under the names, sizes and times of the files.
    """
    return _toolchain(cache, hashlib.sha256(canonical(("toolchain", CACHE_FORMAT, _files_of_triton()))).digest())


@lru_cache
def _toolchain(cache: DiskCache, key: bytes) -> str:
    found, payload = cache.get(key)
    if found is Lookup.HIT:
        return payload.decode()
    computed = hashlib.sha256(triton_key().encode()).hexdigest()
    cache.put(key, computed.encode())
    return computed


@lru_cache(maxsize=1)
def _files_of_triton() -> tuple[tuple[str, int, int, int], ...]:
    """(path, bytes, modification time, inode) of each file that can change what Triton compiles."""
    root = Path(triton.__file__).parent
    files = []
    for folder, _, names in os.walk(root, followlinks=True):  # in a checkout of Triton, its backends are links
        for name in names:
            path = os.path.join(folder, name)
            if name.endswith((".py", ".so", ".bc")) and os.path.exists(path):
                status = os.stat(path)
                files.append((path, status.st_size, status.st_mtime_ns, status.st_ino))
    return tuple(sorted(files))
