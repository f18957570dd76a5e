"""What the figures must reach: one line a figure, and the verdict on a record. Pure, no torch."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jitgraph.bench.plan import DEFAULT_LENGTHS

HOLDS: dict[str, Callable[[float, float], bool]] = {"<=": operator.le, ">=": operator.ge, "=": operator.eq}


class Floor(NamedTuple):
    """A figure (``name`` or ``name.entry``), how it compares, and with what."""

    figure: str
    relation: str
    limit: float


FLOORS = (
    *(Floor(f"ttft_over_linears.{n}", "<=", 1.20) for n in DEFAULT_LENGTHS),
    Floor("decode_over_linears", "<=", 1.15),
    Floor("ttft_p99_over_p50", "<=", 1.05),
    Floor("ttft_requests", ">=", 1000),
    Floor("itl_p99_over_p50", "<=", 1.02),
    Floor("itl_tokens", ">=", 10_000),
    Floor("itl_p99_capturing_over_idle", "<=", 1.03),
    Floor("captures_beside_tokens", ">=", 50),
    Floor("unseen_length_over_exact", "<=", 1.10),
    Floor("unseen_first_padded", "=", 50),
    Floor("unseen_later_exact", "=", 50),
    *(Floor(f"isolated_ttft_over_linears.{n}", "<=", 1.20) for n in DEFAULT_LENGTHS),
    Floor("isolated_decode_over_linears", "<=", 1.15),
    Floor("isolated_ttft_p99_over_p50", "<=", 1.05),
    Floor("isolated_itl_p99_over_p50", "<=", 1.02),
    Floor("isolated_unseen_length_over_exact", "<=", 1.10),
    Floor("compiles_after_ready", "=", 0),
    Floor("captures_on_request_path", "=", 0),
    Floor("graphs_50_mib", "<=", 128),
    Floor("soak_cycles", ">=", 10_000),
    Floor("soak_reserved_growth_bytes", "=", 0),
    Floor("soak_device_growth_mib", "<=", 16),
    Floor("soak_answers_changed", "=", 0),
    Floor("ready_cold_s", "<=", 60),
    Floor("ready_warm_s", "<=", 8),
    Floor("host_us_per_token", "<=", 20),
    Floor("window_stream_tokens", ">=", 20_000),
    Floor("window_graph_growth_bytes", "=", 0),
)


def findings(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The verdict on a record (``runtime.json``): one entry a floor, and whether it is a measurement at all. A figure
    that is missing does not hold."""
    found = [_finding(floor, value_of(record["figures"], floor.figure)) for floor in FLOORS]
    real = not record["emulated"] and not record["quick"]
    flags = record["ceiling"].get("flags", [])
    found.append({"figure": "measured on a GPU, in full", "value": real, "limit": "= True", "holds": real})
    found.append({"figure": "ceilings plausible", "value": not flags, "limit": "= True", "holds": not flags})
    return found


def value_of(figures: Mapping[str, Any], name: str) -> Any:
    """The value of ``name`` or ``name.entry``; None where there is none."""
    first, _, entry = name.partition(".")
    value = figures.get(first)
    return value.get(entry) if entry and isinstance(value, Mapping) else value


def _finding(floor: Floor, value: float | None) -> dict[str, Any]:
    holds = value is not None and HOLDS[floor.relation](value, floor.limit)
    return {"figure": floor.figure, "value": value, "limit": f"{floor.relation} {floor.limit:g}", "holds": holds}
