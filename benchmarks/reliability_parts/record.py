"""The record of all parts, and the floors that its figures must reach. Pure, but for reading and writing the file."""

from __future__ import annotations

import json
import math
import operator
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jitgraph.errors import OutputError

HOLDS: dict[str, Callable[[float, float], bool]] = {"<=": operator.le, ">=": operator.ge, "=": operator.eq}
SOAK_S, SOAK_GPU_S = 3600, 540
"""How long the soak must run: an hour; on a GPU nine minutes."""


PLACE = r"(<!-- figures: {} -->\n).*?(<!-- /figures -->)"
"""Where a document quotes a record, by its name."""


class Floor(NamedTuple):
    """A figure, how it compares, and with what."""

    figure: str
    relation: str
    limit: float
    words: str
    """What it is, for the document."""


FLOORS = (
    Floor("ipc_ttft_us_p50", "<=", 150, "added to TTFT by a process of its own, P50, µs"),
    Floor("ipc_ttft_us_p99", "<=", 300, "the same, P99, µs"),
    Floor("ipc_token_us_p50", "<=", 50, "added to the time between tokens, P50, µs"),
    Floor("kill_error_s", "<=", 1.0, "engine killed under eight streams: the last has its error event after, s"),
    Floor("kill_rounds", ">=", 2, "times that this was done"),
    Floor("kill_faults", "=", 0, "what went wrong with it"),
    Floor("recovery_s", "<=", 60, "engine killed: ready again after, s"),
    Floor("hang_seen_s", "<=", 10, "engine stopped: `/health` fails after, s"),
    Floor("hang_faults", "=", 0, "what went wrong with it"),
    Floor("orphan_s", "<=", 5, "front-end killed: the engine is gone after, s"),
    Floor("frontend_kill_faults", "=", 0, "what was left over"),
    Floor("cancels", ">=", 10_000, "requests cancelled at every moment of their lives"),
    Floor("pages_leaked", "=", 0, "pages missing in the pool afterwards"),
    Floor("tokens_after_cancel_most", "<=", 1, "steps that a cancelled request still ran, at most"),
    Floor("soak_s", ">=", SOAK_S, "mixed load, s"),
    Floor("soak_wrong", "=", 0, "wrong answers in it"),
    Floor("soak_unexplained", "=", 0, "errors in it that no killed engine explains"),
    Floor("soak_pages_leaked", "=", 0, "pages missing after it"),
    Floor("soak_rss_growth_mib", "<=", 50, "growth of a process's memory in it, MiB"),
    Floor("soak_p99_drift", "<=", 0.10, "P99 of TTFT, last third over first, less one"),
    Floor("ipc_frames_fuzzed", ">=", 200_000, "random and mutated frames"),
    Floor("fuzz_crashes", "=", 0, "crashes and hangs by them"),
)


GPU_FLOORS = (
    Floor("soak_gpu_growth_mib", "<=", 16, "growth of the GPU's used memory in it, MiB"),
    Floor("soak_gpu_held_mib", "<=", 16, "GPU memory that is still in use when the server has ended, MiB"),
    Floor("frontend_kill_gpu_held_mib", "<=", 16, "the same when the front-end was killed, MiB"),
)
"""Besides the others, of what runs on a GPU."""
GPU_PARTS = ("frontend_kill", "soak")
"""What a record of a GPU must have; all else is the same on the CPU, where it takes no GPU."""
_ON_GPU = ("orphan_s", "frontend_kill_faults")


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


def floors(record: Mapping[str, Any]) -> tuple[Floor, ...]:
    """What a record must reach, by the device that the soak ran on."""
    if not str(record["parts"].get("soak", {}).get("device", "")).startswith("cuda"):
        return FLOORS
    shared = (one for one in FLOORS if one.figure in _ON_GPU or one.figure.startswith("soak_"))
    shorter = (one._replace(limit=SOAK_GPU_S) if one.figure == "soak_s" else one for one in shared)
    return (*shorter, *GPU_FLOORS)


def findings(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The verdict, one entry a floor. A figure that is missing does not hold."""
    found = []
    for floor in floors(record):
        limit = floor.limit
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


def markdown(record: Mapping[str, Any]) -> str:
    """The verdict as a table of a document, with an empty line around."""
    lines = ["", "| | measured | must be |", "| :--- | ---: | ---: |"]
    for floor, one in zip(floors(record), findings(record), strict=True):
        value = (
            "not measured"
            if one["value"] is None
            else f"{one['value']:,.4g}"
            if one["value"] < 1e4
            else f"{one['value']:,}"
        )
        lines.append(f"| {floor.words} | {value} | {one['limit']} |")
    return "\n".join([*lines, "", ""])


def quoted(text: str, record: Mapping[str, Any]) -> str:
    """A document with the record's table in its place: ``reliability``, or ``reliability on a GPU``."""
    name = "reliability" if floors(record) is FLOORS else "reliability on a GPU"
    place = re.compile(PLACE.format(name), re.DOTALL)
    return place.sub(lambda match: match[1] + markdown(record) + match[2], text)
