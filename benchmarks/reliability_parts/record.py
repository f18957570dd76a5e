"""The record of all parts, and the floors that its figures must reach. Pure, but for reading and writing the file."""

from __future__ import annotations

import json
import math
import operator
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jitgraph.errors import OutputError

HOLDS: dict[str, Callable[[float, float], bool]] = {"<=": operator.le, ">=": operator.ge, "=": operator.eq}
SOAK_S, SOAK_GPU_S = 3600, 540
"""How long the soak must run: an hour; on a GPU nine minutes."""


class Floor(NamedTuple):
    """A figure, how it compares, and with what."""

    figure: str
    relation: str
    limit: float


FLOORS = (
    Floor("ipc_ttft_us_p50", "<=", 150),
    Floor("ipc_ttft_us_p99", "<=", 300),
    Floor("ipc_token_us_p50", "<=", 50),
    Floor("kill_error_s", "<=", 1.0),
    Floor("kill_rounds", ">=", 2),
    Floor("kill_faults", "=", 0),
    Floor("recovery_s", "<=", 60),
    Floor("hang_seen_s", "<=", 10),
    Floor("hang_faults", "=", 0),
    Floor("orphan_s", "<=", 5),
    Floor("frontend_kill_faults", "=", 0),
    Floor("cancels", ">=", 10_000),
    Floor("pages_leaked", "=", 0),
    Floor("tokens_after_cancel_most", "<=", 2),
    Floor("soak_s", ">=", SOAK_S),
    Floor("soak_wrong", "=", 0),
    Floor("soak_unexplained", "=", 0),
    Floor("soak_pages_leaked", "=", 0),
    Floor("soak_rss_growth_mib", "<=", 50),
    Floor("soak_p99_drift", "<=", 0.10),
    Floor("ipc_frames_fuzzed", ">=", 200_000),
    Floor("fuzz_crashes", "=", 0),
)


def read(path: Path) -> dict[str, Any]:
    """The record; an empty one where there is no file.

    Raises:
        OutputError: a file that is none.
    """
    if not path.exists():
        return {"figures": {}, "parts": {}}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {"figures": dict(record["figures"]), "parts": dict(record["parts"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{path} is no record of this benchmark: move it away ({error})") from error


def add(path: Path, part: str, figures: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Writes a part's figures and conditions into the record, in place of its former ones.

    Raises:
        OutputError: the file cannot be written.
    """
    record = read(path)
    for name in record["parts"].get(part, {}).get("figures", ()):
        record["figures"].pop(name, None)
    record["figures"] |= {name: _rounded(value) for name, value in figures.items()}
    record["parts"][part] = {**about, "figures": sorted(figures)}
    record["figures"] = dict(sorted(record["figures"].items()))
    text = json.dumps(record, indent=2, sort_keys=True) + "\n"
    beside = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error


def _rounded(value: Any) -> Any:
    """Four digits after the point; what is not finite was not measured."""
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return value


def findings(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The verdict, one entry a floor. A figure that is missing does not hold."""
    device = str(record["parts"].get("soak", {}).get("device", ""))
    found = []
    for floor in FLOORS:
        limit = SOAK_GPU_S if floor.figure == "soak_s" and device.startswith("cuda") else floor.limit
        value = record["figures"].get(floor.figure)
        holds = value is not None and HOLDS[floor.relation](value, limit)
        limits = f"{floor.relation} {limit:g}"
        found.append({"figure": floor.figure, "value": value, "limit": limits, "holds": holds})
    return found


def lines(record: Mapping[str, Any]) -> list[str]:
    """The verdict as people read it."""
    rows = []
    for one in findings(record):
        verdict = "ok  " if one["holds"] else "none" if one["value"] is None else "MISS"
        value = "" if one["value"] is None else f"{one['value']:g}"
        rows.append(f"{verdict} {one['figure']:<26} {value:>12}  {one['limit']}")
    return rows
