"""Compiling kernels without running them, so that a machine without a GPU can check every kernel.

Inside ``with compile_only(90) as report:`` a launch compiles its specialisation for sm_90, writes it into the report
and returns; tensors may be on the CPU or on ``meta``, where only their dtype and alignment count. The mode belongs to
the thread (or task) that opened it.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jitgraph.errors import DeviceError
from jitgraph.jit.compiler import Binary, compile_binary
from jitgraph.jit.monitor import CompileMonitor
from jitgraph.jit.specialise import Specialisation


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

    def add(self, jit_function: Any, spec: Specialisation, monitor: CompileMonitor) -> Binary:
        """Compiles a specialisation, unless this report has it."""
        key = (jit_function.__module__, jit_function.__qualname__, spec.key)
        with self._lock:
            if key not in self._binaries:
                self._binaries[key] = compile_binary(jit_function, spec, self.arch, monitor)
            return self._binaries[key]

    def table(self) -> str:
        """One line a binary: registers, stack bytes, shared bytes, kernel, signature."""
        lines = [f"{'regs':>5} {'stack':>6} {'shared':>7}  kernel (sm_{self.arch})"]
        for binary in self.binaries:
            figures = f"{binary.registers!s:>5} {binary.local_bytes!s:>6} {binary.shared_bytes:>7}"
            lines.append(f"{figures}  {binary.kernel}({binary.signature})")
        return "\n".join(lines)


ACTIVE_REPORT: ContextVar[CompileReport | None] = ContextVar("jitgraph_compile_only", default=None)
"""The report of the innermost open ``compile_only`` block of this context; None means that launches are real."""


@contextmanager
def compile_only(arch: int) -> Iterator[CompileReport]:
    """Launches inside the block compile for compute capability ``arch`` (80, 90, ...) instead of running.

    Raises:
        DeviceError: ``arch`` is none that the kernels are written for.
    """
    if arch < 80:
        raise DeviceError(f"kernels are compiled for compute capability 80 or newer, not {arch}")
    report = CompileReport(arch)
    token = ACTIVE_REPORT.set(report)
    try:
        yield report
    finally:
        ACTIVE_REPORT.reset(token)
