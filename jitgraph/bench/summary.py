"""``summary.json``: one machine-readable record of a run, schema 1."""

from __future__ import annotations

from typing import Any

from jitgraph.bench.restarts import restart_spread
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
    s = row.summary
    percentiles: dict[str, Any] = {}
    for name in ("p50", "p90", "p95", "p99", "p999"):
        percentiles |= {name: getattr(s, name), f"{name}_ci": list(getattr(s, f"{name}_ci"))}
    return {
        **row.key.to_json(),
        "n": s.n,
        "mean": s.mean,
        "mean_ci": list(s.mean_ci),
        "std": s.std,
        **percentiles,
        "min": s.min,
        "max": s.max,
        "restarts": restart_json(row),
        "ceiling_ms": row.ceiling_ms,
        "ratio": row.ratio,
        "peak_memory_gib": row.peak_memory_gib,
        "host_memory_gib": row.host_memory_gib,
        "energy_j_per_token": row.energy_j_per_token,
        **{name: value for name, value in vars(row.machine).items() if value not in (None, "")},
        "paths": {"exact": 0, "padded": 0, "eager": 0, **row.paths},
        "device": row.device,
        "emulated": row.emulated,
        "notes": list(row.notes),
    }


def restart_json(row: Row) -> dict[str, Any]:
    """How far the means of a row's processes lie apart; only their number where there is one."""
    spread = restart_spread(row)
    return {"n": 1} if spread is None else {"n": len(spread.means), "means": list(spread.means), "std": spread.std}
