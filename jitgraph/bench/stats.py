"""Statistics of latency samples. Pure numpy; owns nothing.

Quantiles interpolate linearly between order statistics (Hyndman and Fan's type 7, numpy's default). The interval of the
99th percentile is the percentile bootstrap (Efron, 1979) with a fixed seed, so the same samples give the same interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BOOTSTRAP_RESAMPLES = 1000
BOOTSTRAP_SEED = 20260423
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """What a list of samples says, in the samples' own unit."""

    n: int
    mean: float
    std: float
    """Sample standard deviation (divided by n - 1); 0 for one sample."""
    p50: float
    p90: float
    p99: float
    p99_ci: tuple[float, float]
    """95 % bootstrap interval of the 99th percentile."""
    min: float
    max: float


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % percentile-bootstrap interval of the mean; None for a single sample, which tells nothing about spread."""
    if len(values) < 2:
        return None
    data = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(BOOTSTRAP_SEED).integers(0, len(data), size=(BOOTSTRAP_RESAMPLES, len(data)))
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(data[picks].mean(axis=1), [tail, 100 - tail])
    return float(low), float(high)


def p99_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % percentile-bootstrap interval of the 99th percentile.

    It cannot reach beyond the largest sample: with few samples it understates the tail, as every such interval does.
    """
    data = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(BOOTSTRAP_SEED).integers(0, len(data), size=(BOOTSTRAP_RESAMPLES, len(data)))
    resampled = np.percentile(data[picks], 99, axis=1)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return float(low), float(high)


def summarise(values: Sequence[float]) -> Summary:
    """The figures of one row; ``values`` must not be empty."""
    data = np.asarray(values, dtype=np.float64)
    assert data.ndim == 1 and len(data) > 0, "a summary needs at least one sample"
    p50, p90, p99 = (float(q) for q in np.percentile(data, [50, 90, 99]))
    return Summary(
        n=len(data),
        mean=float(data.mean()),
        std=float(data.std(ddof=1)) if len(data) > 1 else 0.0,
        p50=p50,
        p90=p90,
        p99=p99,
        p99_ci=p99_interval(values),
        min=float(data.min()),
        max=float(data.max()),
    )
