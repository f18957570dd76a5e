"""Collecting what a run needs compiled, without compiling or running it.

Inside ``with collect() as wanted:`` a launch writes its kernel and specialisation into ``wanted`` and returns. Whoever
runs every step that can occur inside such a block knows every specialisation that can be needed, and hands the list to
``registry.compile_all``. Tensors may be on the GPU, the CPU or ``meta``: only their dtype and alignment count.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NamedTuple

from jitgraph.jit.modes import active
from jitgraph.jit.specialise import Specialisation

if TYPE_CHECKING:
    from jitgraph.jit.kernel import Kernel


class Want(NamedTuple):
    """A specialisation that a launch needs."""

    kernel: Kernel
    spec: Specialisation


class Wanted:
    """The specialisations of one ``collect`` block, each once, in the order of their first launch."""

    def __init__(self, arch: int | None = None) -> None:
        self.arch = arch
        self._lock = threading.Lock()
        self._wants: dict[Hashable, Want] = {}

    def __iter__(self) -> Iterator[Want]:
        with self._lock:
            return iter(tuple(self._wants.values()))

    def __len__(self) -> int:
        return len(self._wants)

    def add(self, kernel: Kernel, spec: Specialisation) -> None:
        """Writes a specialisation down, unless it is there."""
        with self._lock:
            self._wants.setdefault((kernel, spec.key), Want(kernel, spec))


def collect(arch: int | None = None) -> AbstractContextManager[Wanted]:
    """Launches inside the block are written down instead of run.

    ``arch``: the compute capability (90 for 9.0) that wrappers choose their kernels for; None is that of torch's
    current device.
    """
    return active(Wanted(arch))
