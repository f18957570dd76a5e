"""Compiles CUDA C with NVIDIA's run-time compiler, through ``cuda.bindings``; for the few kernels Triton cannot say.

Any thread may call it. Results lie in the same disk cache as those of Triton. ``driver.load_function`` loads them.
"""

from __future__ import annotations

import hashlib
import time
from functools import lru_cache
from types import ModuleType
from typing import Any, Protocol

from jitgraph.errors import CompileError
from jitgraph.jit.canonical import canonical
from jitgraph.jit.disk_cache import CACHE_FORMAT, DiskCache, Lookup, open_cache
from jitgraph.jit.monitor import MONITOR, CompileMonitor, CompileRecord
from jitgraph.jit.strict import require_compiles_allowed

_ELF = b"\x7fELF"
_LOG_LINES = 6


class SourceCompiler(Protocol):
    """What turns CUDA C into a cubin."""

    @property
    def version(self) -> str:
        """Part of the key of all that it compiles."""

    def compile(self, source: str, name: str, options: tuple[str, ...]) -> bytes:
        """The cubin of a source.

        Raises:
            CompileError: with the first lines of the compiler's log.
        """


def compile_source(
    source: str,
    name: str,
    arch: int,
    compiler: SourceCompiler | None = None,
    cache: DiskCache | None = None,
    monitor: CompileMonitor = MONITOR,
) -> bytes:
    """The cubin of a CUDA C source for compute capability ``arch`` (90 for 9.0), from the disk cache or compiled.

    ``name`` stands in messages and in debug information. Functions without ``__host__`` or ``__global__`` are for the
    device; kernels that are loaded by name need ``extern "C"``. ``compiler`` None is NVRTC, ``cache`` None the user's
    own.

    Raises:
        CompileError: the source does not compile, NVRTC is missing, or compiling is forbidden here.
    """
    require_compiles_allowed(name)
    start = time.perf_counter()
    compiler = compiler or nvrtc_compiler()
    cache = cache or open_cache()
    options = (f"--gpu-architecture=sm_{arch}", "-default-device")
    parts = canonical(("nvrtc", CACHE_FORMAT, compiler.version, source, name, options))
    key = hashlib.sha256(parts).digest()
    lookup, cubin = cache.get(key)
    cached = lookup is Lookup.HIT and cubin.startswith(_ELF)
    if not cached:
        cubin = compiler.compile(source, name, options)
        cache.put(key, cubin)
    monitor.record(CompileRecord(name, arch, "CUDA C", (time.perf_counter() - start) * 1e3, cached))
    return cubin


@lru_cache(maxsize=1)
def nvrtc_compiler() -> Nvrtc:
    """NVRTC, through ``cuda.bindings``.

    Raises:
        CompileError: one of the two is not installed.
    """
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise CompileError(_missing(error)) from error
    return Nvrtc(nvrtc)


class Nvrtc:
    """The compiler behind the module ``cuda.bindings.nvrtc``."""

    def __init__(self, api: ModuleType) -> None:
        """Loads the library.

        Raises:
            CompileError: there is none.
        """
        self._api = api
        try:
            major, minor = self._check(api.nvrtcVersion(), "NVRTC", "asking for its version")
        except RuntimeError as error:  # how the bindings say that the library cannot be found
            raise CompileError(_missing(error)) from error
        self.version = f"{major}.{minor}"

    def compile(self, source: str, name: str, options: tuple[str, ...]) -> bytes:
        """The cubin of a source.

        Raises:
            CompileError: with the first lines of NVRTC's log.
        """
        api = self._api
        created = api.nvrtcCreateProgram(source.encode(), f"{name}.cu".encode(), 0, [], [])
        program = self._check(created, name, "reading the source")
        try:
            done = api.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
            if done[0] != 0:
                raise CompileError(
                    f"{name} does not compile with NVRTC {self.version} and {options[0]}: {self._log(program)}"
                )
            size = self._check(api.nvrtcGetCUBINSize(program), name, "sizing its cubin")
            cubin = bytes(size)  # filled in place: the bindings want bytes, and nobody else has these yet
            self._check(api.nvrtcGetCUBIN(program, cubin), name, "fetching its cubin")
            return cubin
        finally:
            api.nvrtcDestroyProgram(program)

    def _log(self, program: Any) -> str:
        """The first lines of what the compiler said about a program."""
        error, size = self._api.nvrtcGetProgramLogSize(program)
        if error != 0 or size < 2:  # an empty log is one zero byte, and Python shares bytes objects that small
            return "it says nothing about the reason"
        log = bytes(size)
        self._api.nvrtcGetProgramLog(program, log)
        lines = [line.strip() for line in log.rstrip(b"\0").decode(errors="replace").splitlines()]
        return " | ".join([line for line in lines if line][:_LOG_LINES])

    def _check(self, result: tuple[Any, ...], name: str, doing: str) -> Any:
        """The value or values of a call, or its error in words."""
        if result[0] != 0:
            words = self._api.nvrtcGetErrorString(result[0])[1]
            raise CompileError(f"{name}: NVRTC failed when {doing}: {words.decode(errors='replace')}")
        return result[1] if len(result) == 2 else result[1:]


def _missing(error: Exception) -> str:
    return (
        "CUDA C cannot be compiled: install cuda-bindings and NVRTC (pip install cuda-bindings nvidia-cuda-nvrtc, or "
        f"a CUDA build of PyTorch, which brings both) ({str(error).splitlines()[0] if str(error) else error!r})"
    )
