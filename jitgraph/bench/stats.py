"""Statistics of latency samples. Pure numpy; owns nothing.

Quantiles interpolate linearly between order statistics (Hyndman and Fan's type 7, numpy's default). Intervals
are the percentile bootstrap (Efron, 1979) with a fixed seed, so the same samples give the same interval.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

BOOTSTRAP_RESAMPLES = 1000
BOOTSTRAP_SEED = 20260423
CONFIDENCE = 0.95
PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)
CHUNK_VALUES = 4_000_000
"""Resampled values held at a time."""
Interval = tuple[float, float]
Draws = npt.NDArray[Any]


@dataclass(frozen=True)
class Summary:
    """What a list of samples says, in the samples' own unit. Intervals are 95 % bootstrap intervals, a point where
    there is but one sample."""

    n: int
    mean: float
    mean_ci: Interval
    std: float
    """Sample standard deviation (divided by n - 1); 0 for one sample."""
    p50: float
    p50_ci: Interval
    p90: float
    p90_ci: Interval
    p95: float
    p95_ci: Interval
    p99: float
    p99_ci: Interval
    """An interval of a tail cannot reach beyond the largest sample: with few samples it understates the tail, as every
    such interval does."""
    p999: float
    p999_ci: Interval
    min: float
    max: float


def _picks(n: int, processes: Sequence[int] = ()) -> Iterator[Draws]:
    """Indices of the resamples, ``[resamples, n]`` in all, some at a time; always the same ones for the same arguments.
    ``processes``: of each value, the process that took it; samples of one process are alike, so where there are
    several, processes are drawn first and samples within them."""
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    groups = [np.flatnonzero(np.asarray(processes) == one) for one in sorted(set(processes))]
    step = max(1, min(BOOTSTRAP_RESAMPLES, CHUNK_VALUES // n))
    for start in range(0, BOOTSTRAP_RESAMPLES, step):
        rows = min(step, BOOTSTRAP_RESAMPLES - start)
        yield generator.integers(0, n, size=(rows, n)) if len(groups) < 2 else _nested(generator, groups, rows, n)


def _nested(generator: np.random.Generator, groups: Sequence[Draws], rows: int, n: int) -> Draws:
    """As many draws of groups as there are groups, and within each as many samples as are its share of n."""
    sizes = np.asarray([len(group) for group in groups])
    places = np.zeros((len(groups), sizes.max()), dtype=np.int64)
    for index, group in enumerate(groups):
        places[index, : len(group)] = group
    slot = np.arange(n) * len(groups) // n
    chosen = generator.integers(0, len(groups), size=(rows, len(groups)))[:, slot]
    within = (generator.random((rows, n)) * sizes[chosen]).astype(np.int64)
    found: Draws = places[chosen, within]
    return found


def _interval(draws: Draws) -> Interval:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(draws, [tail, 100 - tail])
    return float(low), float(high)


def resampled(values: Sequence[float], statistic: str, processes: Sequence[int] = ()) -> Draws:
    """The statistic (``mean`` or ``p99``) of every resample, ``[resamples]``."""
    data = np.asarray(values, dtype=np.float64)
    parts = []
    for picks in _picks(len(data), processes):
        taken = data[picks]
        parts.append(taken.mean(axis=1) if statistic == "mean" else np.percentile(taken, 99, axis=1))
    return np.concatenate(parts)


def mean_interval(values: Sequence[float]) -> Interval | None:
    """95 % percentile-bootstrap interval of the mean; None for a single sample, which tells nothing about spread."""
    return None if len(values) < 2 else _interval(resampled(values, "mean"))


def p99_interval(values: Sequence[float]) -> Interval:
    """The same of the 99th percentile, for any number of samples. It cannot reach beyond the largest one: with few it
    understates the tail, as every such interval does."""
    return _interval(resampled(values, "p99"))


def average_interval(
    columns: Sequence[Sequence[float]], statistic: str, processes: Sequence[Sequence[int]] = ()
) -> Interval | None:
    """95 % interval of the average of a statistic over several lists, each resampled by itself; None where a list has a
    single sample. ``processes``: for each list, who took its values."""
    if not columns or any(len(values) < 2 for values in columns):
        return None
    # The picks are seeded by the count alone, so equally long lists would move together: each is shuffled by its place.
    order = [np.random.default_rng(BOOTSTRAP_SEED + place) for place in range(len(columns))]
    taken = processes or [()] * len(columns)
    draws = [
        rng.permutation(resampled(values, statistic, by)) for rng, values, by in zip(order, columns, taken, strict=True)
    ]
    return _interval(np.mean(draws, axis=0))


def overlap(one: Interval, other: Interval) -> bool:
    """Whether two intervals have a point in common."""
    return one[0] <= other[1] and other[0] <= one[1]


def summarise(values: Sequence[float], processes: Sequence[int] = ()) -> Summary:
    """The figures of one row; ``values`` must not be empty. ``processes``: of each value, the process that took it."""
    data = np.asarray(values, dtype=np.float64)
    assert data.ndim == 1 and len(data) > 0, "a summary needs at least one sample"
    means, tails = [], []
    for picks in _picks(len(data), processes):
        taken = data[picks]
        means.append(taken.mean(axis=1))
        tails.append(np.percentile(taken, PERCENTILES, axis=1))
    spread = np.concatenate(tails, axis=1)
    found: dict[str, Any] = {}
    for index, name in enumerate(("p50", "p90", "p95", "p99", "p999")):
        found[name] = float(np.percentile(data, PERCENTILES[index]))
        found[f"{name}_ci"] = _interval(spread[index])
    return Summary(
        n=len(data),
        mean=float(data.mean()),
        mean_ci=_interval(np.concatenate(means)),
        std=float(data.std(ddof=1)) if len(data) > 1 else 0.0,
        min=float(data.min()),
        max=float(data.max()),
        **found,
    )
