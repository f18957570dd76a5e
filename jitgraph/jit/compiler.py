"""Makes the binary of one specialisation for one architecture: from the disk cache, or by compiling it.

Needs neither a GPU nor a C compiler. Any thread may call it, and several at once: Triton gives each compilation its own
compiler context, its passes and ptxas leave the interpreter to others, and its own asynchronous compilation does the
same.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from jitgraph.errors import CompileError
from jitgraph.jit.binary import Binary, decode_binary, encode_binary
from jitgraph.jit.cache_key import kernel_key
from jitgraph.jit.cubin import resource_use
from jitgraph.jit.disk_cache import DiskCache, Lookup, open_cache
from jitgraph.jit.monitor import CompileMonitor, CompileRecord
from jitgraph.jit.private_cache import private_cache
from jitgraph.jit.specialise import Specialisation

_WARP_SIZE = 32


@dataclass(frozen=True)
class Made:
    """A binary and where it came from."""

    binary: Binary
    lookup: Lookup
    """What the disk cache said; the binary was compiled unless it is a hit."""
    stored: bool
    """Whether it lies on disk now."""


def make_binary(
    jit_function: Any, spec: Specialisation, arch: int, monitor: CompileMonitor, cache: DiskCache | None = None
) -> Made:
    """Reads or compiles ``jit_function`` (a ``triton.jit`` function) for compute capability ``arch``, and counts it.

    ``cache`` None is the user's own, below ``config.cache_dir()``.

    Raises:
        TypeError: an option that Triton does not know.
        CompileError: it does not compile.
    """
    start = time.perf_counter()
    cache = cache or open_cache()
    name = f"{jit_function.__module__}.{jit_function.__qualname__}"
    target = GPUTarget("cuda", arch, _WARP_SIZE)
    backend = make_backend(target)
    options = {"enable_fp_fusion": triton.knobs.language.default_fp_fusion} | dict(spec.options)
    with compile_errors(jit_function, spec, arch):
        parsed = backend.parse_options(dict(options))
    unknown = options.keys() - vars(parsed).keys()
    if unknown:
        raise TypeError(f"kernel {jit_function.__name__} has no parameter or option {', '.join(sorted(unknown))}")
    with compile_errors(jit_function, spec, arch):
        key = kernel_key(jit_function, spec, backend, parsed, cache)
    made = _read(cache, key, name, spec, arch, start)
    if isinstance(made, Lookup):
        with compile_errors(jit_function, spec, arch), private_cache():
            compiled = triton.compile(_source(jit_function, spec, backend), target=target, options=options)
        binary = _binary(compiled, name, spec, arch, (time.perf_counter() - start) * 1e3)
        stored = key is not None and cache.put(key, encode_binary(binary))
        made = Made(binary, made, stored)
    monitor.record(CompileRecord(name, arch, made.binary.signature, made.binary.ms, made.lookup is Lookup.HIT))
    return made


def _read(
    cache: DiskCache, key: bytes | None, name: str, spec: Specialisation, arch: int, start: float
) -> Made | Lookup:
    """The binary that lies under a key, or why there is none."""
    if key is None:
        return Lookup.BYPASSED
    lookup, payload = cache.get(key)
    if lookup is not Lookup.HIT:
        return lookup
    try:
        binary = decode_binary(payload, name, spec, arch, (time.perf_counter() - start) * 1e3)
    except ValueError:
        return Lookup.DAMAGED
    return Made(binary, Lookup.HIT, True)


def _source(jit_function: Any, spec: Specialisation, backend: Any) -> ASTSource:
    return ASTSource(
        fn=jit_function,
        signature=dict(spec.types),
        constexprs={(index,): value for index, value in spec.constants},
        attrs={(index,): backend.parse_attr("D") for index in spec.divisible},
    )


@contextmanager
def compile_errors(jit_function: Any, spec: Specialisation, arch: int) -> Iterator[None]:
    """Turns what goes wrong inside the block, where a kernel is looked at or compiled, into a ``CompileError``."""
    try:
        yield
    except Exception as error:  # Triton's, the assembler's and the operating system's errors have nothing in common
        raise CompileError(
            f"kernel {jit_function.__module__}.{jit_function.__qualname__}({spec.describe()}) does not compile for "
            f"sm_{arch} with Triton {triton.__version__} ({type(error).__name__}: {_gist(error)}); use a Triton that "
            "jitgraph is tested with, or ops='torch'"
        ) from error


def _gist(error: Exception) -> str:
    """The first and the last line of a message; those of a compiler are long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ... ".join(dict.fromkeys((lines[0], lines[-1]))) if lines else "no message"


def _binary(compiled: Any, name: str, spec: Specialisation, arch: int, ms: float) -> Binary:
    meta = compiled.metadata
    cubin = compiled.asm["cubin"]
    use = resource_use(cubin)
    return Binary(
        kernel=name,
        symbol=meta.name,
        arch=arch,
        signature=spec.describe(),
        argument_types=spec.argument_types,
        num_warps=meta.num_warps,
        num_ctas=meta.num_ctas,
        shared_bytes=meta.shared,
        scratch_bytes=meta.global_scratch_size + meta.profile_scratch_size,
        launch_pdl=meta.launch_pdl,
        cooperative=meta.launch_cooperative_grid,
        registers=use.registers,
        local_bytes=use.local_bytes,
        ms=ms,
        cubin=cubin,
        ptx=compiled.asm.get("ptx", ""),
    )
