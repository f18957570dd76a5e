"""Makes everything ready that a configuration can need, many kernels at once, before the first request.

``collect`` says what is needed, ``compile_all`` compiles it or reads it from the disk cache, in a pool of threads, and
loads it on the device. Afterwards a launch of any of it finds its kernel loaded.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from jitgraph.errors import DeviceError
from jitgraph.jit.cache_key import toolchain
from jitgraph.jit.collect import Want
from jitgraph.jit.compile_only import require_supported
from jitgraph.jit.compiler import Made, compile_errors, make_binary
from jitgraph.jit.disk_cache import DiskCache, Lookup, open_cache
from jitgraph.jit.driver import bindings
from jitgraph.jit.source_digest import source_digest
from jitgraph.jit.strict import require_compiles_allowed
from jitgraph.jit.target import device_arch

Progress = Callable[[str, int, int], None]
"""Called as ``progress(phase, done, total)``."""

MOST_WORKERS = 16
"""More threads than this wait for the interpreter, which turns a kernel's source into Triton's first form."""


@dataclass(frozen=True)
class CompileSummary:
    """What ``compile_all`` did, in specialisations."""

    total: int = 0
    """Asked for, each once."""
    ready_before: int = 0
    """Loaded already."""
    hits: int = 0
    """Read from the disk cache."""
    compiled: int = 0
    damaged: int = 0
    """Of those compiled: what the disk cache had for them could not be trusted."""
    bypassed: int = 0
    """Of those compiled: not to be cached, by a Triton debugging switch or a constant of an unusual type."""
    unwritable: int = 0
    """Of those compiled: the disk cache could not keep them, so the next process compiles them again."""
    left: int = 0
    """Left to their first launch: ``cuda.bindings`` is missing, and Triton's own launcher compiles for itself."""
    workers: int = 0
    ms: float = 0.0
    """Host milliseconds from beginning to end."""


def compile_all(
    wanted: Iterable[Want],
    target: torch.device | int,
    workers: int | None = None,
    progress: Progress | None = None,
    cache: DiskCache | None = None,
) -> CompileSummary:
    """Compiles what is wanted, or reads it from the disk cache, and loads it.

    ``target``: a CUDA device, or a compute capability (90 for 9.0) to compile for without loading. ``workers``:
    threads, ``default_workers()`` where None. ``progress("compile", done, total)`` is called on the caller's thread.
    ``cache`` None is the user's own.

    Raises:
        CompileError: a kernel does not compile; the message names it, and what had not begun was given up.
        DeviceError: ``target`` cannot run kernels, or one of them cannot be loaded.
    """
    started = time.perf_counter()
    device, arch = _resolve(target)
    unique = {(want.kernel, want.spec.key): want for want in wanted if not want.kernel.interpreted}
    wants = list(unique.values())
    if device is not None and bindings() is None:
        return CompileSummary(total=len(wants), left=len(wants), ms=_ms_since(started))
    missing = [want for want in wants if device is None or not want.kernel.is_ready(want.spec, device)]
    cache = cache or open_cache()
    _prepare(missing, arch, cache)
    threads = min(workers or default_workers(), len(missing))

    def make(want: Want) -> Made | None:
        if device is not None:
            return want.kernel.make_ready(want.spec, device, cache)
        return make_binary(want.kernel.jit_function, want.spec, arch, want.kernel.monitor, cache)

    made = _run(make, missing, threads, progress or _silent)
    return _summary(made, len(wants), threads, _ms_since(started))


def default_workers() -> int:
    """Threads that compile at once: one for each core that this process may use, at most ``MOST_WORKERS``."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count()
    return min(MOST_WORKERS, cores or 1)


def _resolve(target: torch.device | int) -> tuple[int | None, int]:
    """(CUDA device to load on or None, compute capability)."""
    if isinstance(target, int):
        return None, require_supported(target)
    if target.type != "cuda":
        raise DeviceError(f"kernels are compiled for a CUDA device, not for {target}")
    index = torch.cuda.current_device() if target.index is None else target.index
    return index, device_arch(index)


def _prepare(wants: list[Want], arch: int, cache: DiskCache) -> None:
    """What would be done several times, or under each other's locks, if the threads of the pool did it."""
    for want in wants:
        require_compiles_allowed(f"{want.kernel.__name__}({want.spec.describe()})")
        with compile_errors(want.kernel.jit_function, want.spec, arch):
            source_digest(want.kernel.jit_function)
    if wants:
        toolchain(cache)


def _run(make: Callable[[Want], Made | None], wants: list[Want], threads: int, progress: Progress) -> list[Made | None]:
    """``make`` of each, in threads of their own, so that none of them has used another CUDA device before."""
    made: list[Made | None] = []
    if not wants:
        return made
    with _pool(threads) as pool:
        futures = [pool.submit(make, want) for want in wants]
        for done, future in enumerate(as_completed(futures), 1):
            made.append(future.result())
            progress("compile", done, len(wants))
    return made


@contextmanager
def _pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    """A pool that, when its block fails, gives up what has not begun and waits for the rest."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="jitgraph-compile")
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _summary(made: list[Made | None], total: int, workers: int, ms: float) -> CompileSummary:
    fresh = [entry for entry in made if entry is not None]
    compiled = [entry for entry in fresh if entry.lookup is not Lookup.HIT]
    return CompileSummary(
        total=total,
        ready_before=total - len(fresh),
        hits=len(fresh) - len(compiled),
        compiled=len(compiled),
        damaged=sum(entry.lookup is Lookup.DAMAGED for entry in compiled),
        bypassed=sum(entry.lookup is Lookup.BYPASSED for entry in compiled),
        unwritable=sum(entry.lookup is not Lookup.BYPASSED and not entry.stored for entry in compiled),
        workers=workers,
        ms=ms,
    )


def _ms_since(started: float) -> float:
    return (time.perf_counter() - started) * 1e3


def _silent(phase: str, done: int, total: int) -> None:
    pass
