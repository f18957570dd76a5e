"""Case 4, JIT + CUDA graph: JIT kernels read what changes from device memory, so one graph holds the whole step,
sampling included; a stream alone is decoded in loops on the device. The engine as users get it, in a process of its
own."""

from __future__ import annotations

from jitgraph.bench.cases.common import Case, EngineCase


def make() -> Case:
    """The case, not loaded yet."""
    return EngineCase(ops="jit", graphs=True, fused_sampling=True, isolated=True)
