"""Case 2, CUDA graph only: the whole forward with its KV writes is captured, every op is plain PyTorch, and the token
is chosen and appended outside the graph. The engine has a process of its own."""

from __future__ import annotations

from jitgraph.bench.cases.common import Case, EngineCase


def make() -> Case:
    """The case, not loaded yet."""
    return EngineCase(ops="torch", graphs=True, fused_sampling=False, isolated=True)
