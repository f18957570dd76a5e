"""``summary.json``: one machine-readable record of a run, schema 1."""

from __future__ import annotations

from typing import Any

from jitgraph.bench.study import Row, Study

SCHEMA = 1


def summary_json(study: Study) -> dict[str, Any]:
    """The whole study. ``cases`` says of each case how it went; everything else is the documented schema."""
    return {
        "schema": SCHEMA,
        "environment": dict(study.environment),
        "model": dict(study.model),
        "ceiling": dict(study.ceiling),
        "cases": {name: dict(facts) for name, facts in study.cases.items()},
        "rows": [row_json(row) for row in study.rows],
    }


def row_json(row: Row) -> dict[str, Any]:
    """One row; statistics are in the unit that the metric's name ends with."""
    summary = row.summary
    return {
        **row.key.to_json(),
        "n": summary.n,
        "mean": summary.mean,
        "std": summary.std,
        "p50": summary.p50,
        "p90": summary.p90,
        "p99": summary.p99,
        "p99_ci": list(summary.p99_ci),
        "min": summary.min,
        "max": summary.max,
        "ceiling_ms": row.ceiling_ms,
        "ratio": row.ratio,
        "peak_memory_gib": row.peak_memory_gib,
        "paths": {"exact": 0, "padded": 0, "eager": 0, **row.paths},
        "device": row.device,
        "emulated": row.emulated,
        "notes": list(row.notes),
    }
