"""Compiles one specialisation of a kernel for one architecture. Needs neither a GPU nor a C compiler.

Any thread may call it. Triton keeps the results on disk, under ``config.cache_dir()``, by source, versions and target.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from jitgraph import config
from jitgraph.jit.cubin import resource_use
from jitgraph.jit.monitor import CompileMonitor, CompileRecord
from jitgraph.jit.specialise import Specialisation

_WARP_SIZE = 32


@dataclass(frozen=True)
class Binary:
    """A compiled specialisation and what a launch of it needs. Picklable."""

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
    cubin: bytes = field(repr=False)
    ptx: str = field(repr=False)

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.num_warps * _WARP_SIZE


def use_cache_dir() -> None:
    """Points Triton's disk cache below ``config.cache_dir()``, unless the user already gave Triton another folder."""
    knobs = triton.knobs.cache
    if knobs.dir == knobs.get_triton_dir("cache"):
        knobs.dir = os.path.join(config.cache_dir(), "triton")


def compile_binary(jit_function: Any, spec: Specialisation, arch: int, monitor: CompileMonitor) -> Binary:
    """Compiles ``jit_function`` (a ``triton.jit`` function) for compute capability ``arch``, and counts it.

    Raises:
        TypeError: an option that Triton does not know.
    """
    start = time.perf_counter()
    use_cache_dir()
    target = GPUTarget("cuda", arch, _WARP_SIZE)
    backend = make_backend(target)
    options = dict(spec.options)
    unknown = options.keys() - vars(backend.parse_options(dict(options))).keys()
    if unknown:
        raise TypeError(f"kernel {jit_function.__name__} has no parameter or option {', '.join(sorted(unknown))}")
    source = ASTSource(
        fn=jit_function,
        signature=dict(spec.types),
        constexprs={(index,): value for index, value in spec.constants},
        attrs={(index,): backend.parse_attr("D") for index in spec.divisible},
    )
    compiled = triton.compile(source, target=target, options=options)
    ms = (time.perf_counter() - start) * 1e3
    binary = _binary(jit_function, spec, arch, compiled, ms)
    monitor.record(CompileRecord(binary.kernel, arch, binary.signature, ms))
    return binary


def _binary(jit_function: Any, spec: Specialisation, arch: int, compiled: Any, ms: float) -> Binary:
    meta = compiled.metadata
    cubin = compiled.asm["cubin"]
    use = resource_use(cubin)
    return Binary(
        kernel=f"{jit_function.__module__}.{jit_function.__qualname__}",
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
