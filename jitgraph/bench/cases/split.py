"""Ablation: the hybrid's kernels and graphs side by side instead of as one. Graphs hold the static ops alone; the JIT
kernels of the dynamic ones are launched between them, step by step."""

from __future__ import annotations

from jitgraph.bench.cases.common import Case, EngineCase


def make() -> Case:
    """The case, not loaded yet."""
    return EngineCase(ops="jit", graphs=True, fused_sampling=True, graph_scope="static", device_loop=False)
