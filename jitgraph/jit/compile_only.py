"""Compiling kernels without running them, so that a machine without a GPU can check every kernel.

Inside ``with compile_only(90) as report:`` a launch compiles its specialisation for sm_90, writes it into the report
and returns; tensors may be on the CPU or on ``meta``, where only their dtype and alignment count. The mode belongs to
the thread (or task) that opened it.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from jitgraph.errors import DeviceError
from jitgraph.jit.binary import Binary
from jitgraph.jit.compiler import make_binary
from jitgraph.jit.modes import active
from jitgraph.jit.specialise import Specialisation

if TYPE_CHECKING:
    from jitgraph.jit.kernel import Kernel


class CompileReport:
    """The binaries of one ``compile_only`` block, each specialisation once, in the order of their first launch."""

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self._lock = threading.Lock()
        self._binaries: dict[Hashable, Binary] = {}

    @property
    def binaries(self) -> tuple[Binary, ...]:
        """What was compiled."""
        with self._lock:
            return tuple(self._binaries.values())

    @property
    def kernels(self) -> frozenset[str]:
        """Qualified names of the kernels that were compiled."""
        return frozenset(binary.kernel for binary in self.binaries)

    def add(self, kernel: Kernel, spec: Specialisation) -> Binary:
        """Compiles a specialisation, unless this report has it.

        Raises:
            DeviceError: Triton runs as an interpreter in this process.
            CompileError: it does not compile.
        """
        if kernel.interpreted:
            raise DeviceError("kernels cannot be compiled under TRITON_INTERPRET=1; unset it before importing jitgraph")
        key = (kernel, spec.key)
        with self._lock:
            if key not in self._binaries:
                self._binaries[key] = make_binary(kernel.jit_function, spec, self.arch, kernel.monitor).binary
            return self._binaries[key]

    def table(self) -> str:
        """One line a binary: registers, stack bytes, shared bytes, kernel, signature."""
        lines = [f"{'regs':>5} {'stack':>6} {'shared':>7}  kernel (sm_{self.arch})"]
        for binary in self.binaries:
            figures = f"{binary.registers!s:>5} {binary.local_bytes!s:>6} {binary.shared_bytes:>7}"
            lines.append(f"{figures}  {binary.kernel}({binary.signature})")
        return "\n".join(lines)


def compile_only(arch: int) -> AbstractContextManager[CompileReport]:
    """Launches inside the block compile for compute capability ``arch`` (80, 90, ...) instead of running.

    Raises:
        DeviceError: ``arch`` is none that the kernels are written for.
    """
    return active(CompileReport(require_supported(arch)))


def require_supported(arch: int) -> int:
    """``arch``, if kernels are written for it.

    Raises:
        DeviceError: they are not.
    """
    if arch < 80:
        raise DeviceError(f"kernels are compiled for compute capability 80 or newer, not {arch}")
    return arch
