"""The figures of a load run, from its records alone. Pure, owns nothing.

Only whole answers count as latency: cancelled and failed requests are counted, and cancelled ones have a TTFT of their
own. Definitions are AIPerf's; what it calls inter token latency, a figure of each request, is ``tpot_ms`` here, while
``itl_ms`` is every single gap between two tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jitgraph.bench.load.limits import Limit
from jitgraph.bench.load.records import CANCELLED, ERROR, OK, Record, gaps_ms
from jitgraph.bench.stats import p99_interval

MOST_RESAMPLED = 10_000
"""A bootstrap of more values takes too much memory, and has nothing left to tell."""


def spread(values: Iterable[float | None], *, interval: bool = True) -> dict[str, Any] | None:
    """n, mean, standard deviation, quantiles and extremes of what is not None; None where nothing is.

    ``interval``: with the 95 % bootstrap interval of the 99th percentile, for values that are independent.
    """
    data = np.asarray([value for value in values if value is not None], dtype=np.float64)
    if not len(data):
        return None
    p50, p90, p95, p99 = (float(q) for q in np.percentile(data, [50, 90, 95, 99]))
    found = {"n": len(data), "mean": float(data.mean()), "std": float(data.std(ddof=1)) if len(data) > 1 else 0.0}
    found |= {"min": float(data.min()), "p50": p50, "p90": p90, "p95": p95, "p99": p99, "max": float(data.max())}
    if interval and len(data) <= MOST_RESAMPLED:
        return {**found, "p99_ci": list(p99_interval(data.tolist()))}
    return found


def meets(record: Record, limits: Sequence[Limit]) -> bool:
    """Whether an answer came whole and within all limits. One token has no TPOT, and so keeps its limit."""
    if record.outcome != OK:
        return False
    values = ((getattr(record, f"{limit.metric}_ms"), limit.most_ms) for limit in limits)
    return all(value is None or value <= most_ms for value, most_ms in values)


def span_s(records: Sequence[Record]) -> float:
    """Seconds from the first send to the end of the last stream; 0 without records."""
    if not records:
        return 0.0
    return (max(record.end_ms for record in records) - min(record.send_ms for record in records)) / 1e3


def goodput(records: Sequence[Record], limits: Sequence[Limit]) -> dict[str, Any]:
    """Answers within all limits: their share of the requests that were not cancelled by plan, how many a second, and
    whether the 99th percentile of each limited metric keeps its limit (False where nothing was measured)."""
    held = [record for record in records if record.outcome != CANCELLED]
    good = sum(meets(record, limits) for record in held)
    whole = [record for record in held if record.outcome == OK]
    span = span_s(records)
    kept = {}
    for limit in limits:
        found = spread((getattr(record, f"{limit.metric}_ms") for record in whole), interval=False)
        kept[str(limit)] = bool(found and found["p99"] <= limit.most_ms)
    return {
        "limits": [str(limit) for limit in limits],
        "good": good,
        "share": good / len(held) if held else None,
        "requests_per_s": good / span if span else None,
        "p99_within": kept,
    }


def figures(records: Sequence[Record], limits: Sequence[Limit] = ()) -> dict[str, Any]:
    """Everything that a run's records say; times in milliseconds, rates per second."""
    whole = [record for record in records if record.outcome == OK]
    left = [record for record in records if record.outcome == CANCELLED]
    failed = [record for record in records if record.outcome == ERROR]
    span = span_s(records)
    tokens = sum(record.tokens for record in whole)
    return {
        "requests": {"sent": len(records), "ok": len(whole), "cancelled": len(left), "errors": len(failed)},
        "errors_by_kind": dict(Counter(str(record.error) for record in failed).most_common()),
        "shorter_than_asked": sum(record.tokens < record.asked_tokens for record in whole),
        "duration_s": span,
        "requests_per_s": len(whole) / span if span else None,
        "output_tokens_per_s": tokens / span if span else None,
        "prompt_tokens": sum(record.prompt_tokens for record in whole),
        "output_tokens": tokens,
        "ttft_ms": spread(record.ttft_ms for record in whole),
        "tpot_ms": spread(record.tpot_ms for record in whole),
        "e2e_ms": spread(record.e2e_ms for record in whole),
        # Gaps of one answer depend on each other, so that an interval from resampling them would be too narrow.
        "itl_ms": spread(gaps_ms(whole), interval=False),
        "queue_ms": spread(record.queue_ms for record in records),
        "cancelled": {"ttft_ms": spread(record.ttft_ms for record in left), "tokens": sum(r.tokens for r in left)},
        "goodput": goodput(records, limits) if limits else None,
    }
