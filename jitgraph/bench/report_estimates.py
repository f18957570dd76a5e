"""A figure with its interval, and when two of them differ. Pure; shared by the speed-up analysis and by comparisons.

Intervals are 95 % percentile bootstraps (``stats``). Two figures differ where their intervals do not overlap, which
asks for more than a test of the difference would; a figure without an interval differs from nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from jitgraph.bench.study import Row

MEAN, P99 = "mean", "p99"


@dataclass(frozen=True)
class Estimate:
    """A mean or a P99, in its metric's unit."""

    value: float
    interval: tuple[float, float] | None
    """None for a single sample."""
    emulated: bool


def estimate(row: Row, statistic: str) -> Estimate:
    """What a row says of its mean or its P99."""
    if statistic == MEAN:
        return Estimate(row.summary.mean, row.summary.mean_ci if row.summary.n > 1 else None, row.emulated)
    return Estimate(row.summary.p99, row.summary.p99_ci if row.summary.n > 1 else None, row.emulated)


def apart(one: Estimate, other: Estimate) -> bool:
    """Whether the intervals of two figures do not overlap."""
    if one.interval is None or other.interval is None:
        return False
    return one.interval[1] < other.interval[0] or other.interval[1] < one.interval[0]
