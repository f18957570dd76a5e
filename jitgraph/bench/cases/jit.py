"""Case 3, JIT only: static ops are native PyTorch, what changes from step to step is JIT kernels, without a graph."""

from __future__ import annotations

from jitgraph.bench.cases.common import Case, EngineCase


def make() -> Case:
    """The case, not loaded yet."""
    return EngineCase(ops="mixed", graphs=False, fused_sampling=True)
