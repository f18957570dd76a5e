"""Ablation: Triton kernels for every op, matrix products included, each launched by the host; no graph."""

from __future__ import annotations

from jitgraph.bench.cases.common import Case, EngineCase


def make() -> Case:
    """The case, not loaded yet."""
    return EngineCase(ops="jit-all", graphs=False, fused_sampling=True)
