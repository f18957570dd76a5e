"""What a folder knows of a decode step's cost to the host and of padding. Reads records, measures nothing.

The five cases tell it themselves (``attribution`` in their facts). Where they do not, and for the cost of padding, the
record of the runtime's own benchmark in the same folder (``raw/runtime-<part>.json``) is asked; what comes from there
is said to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from jitgraph.bench.ablation import HOST_US, LAUNCHES
from jitgraph.bench.environment import differences
from jitgraph.bench.plan import ABLATION_COLUMNS
from jitgraph.bench.records import raw_path, read_json
from jitgraph.bench.study import Study
from jitgraph.errors import OutputError


@dataclass(frozen=True)
class HostCost:
    """What a decode step of each of this engine's cases costs the host."""

    host_us: Mapping[str, float]
    launches: Mapping[str, float]
    sources: tuple[str, ...]
    """Where figures come from that are not of this run, and what is missing, one sentence each."""


@dataclass(frozen=True)
class Padding:
    """First request of an unseen length (padded to a bucket) beside later ones (exact), in milliseconds."""

    padded_ms: Mapping[int, float]
    exact_ms: Mapping[int, float]
    """Median of the later requests."""
    emulated: bool
    source: str

    @property
    def ratios(self) -> dict[int, float]:
        """Prompt tokens to padded over exact."""
        return {n: self.padded_ms[n] / self.exact_ms[n] for n in sorted(self.padded_ms)}

    @property
    def mean_ratio(self) -> float:
        """Mean of the ratios."""
        return mean(self.ratios.values())


def host_cost(study: Study, folder: Path) -> HostCost:
    """Of the cases' own facts first, else of the runtime's record."""
    own = {case: study.cases.get(case, {}).get("attribution") or {} for case in ABLATION_COLUMNS}
    own = {case: figures for case, figures in own.items() if HOST_US in figures or LAUNCHES in figures}
    record, sources = _part(folder, "host"), []
    besides: dict[str, Mapping[str, float]] = {}
    if record is not None:
        besides = {
            case: figures
            for case, figures in record["samples"]["cases"].items()
            if case in ABLATION_COLUMNS and case not in own
        }
        if besides:
            sources.append(f"{_named(besides)}: {_origin(study, record, 'host')}.")
    found = {**besides, **own}
    missing = [case for case in ABLATION_COLUMNS if case not in found and case in study.cases]
    for case in missing:
        error = study.cases[case].get("attribution_error")
        sources.append(f"{case}: {error or 'its record says nothing of what a step costs the host'}.")
    return HostCost(
        host_us={case: float(found[case][HOST_US]) for case in ABLATION_COLUMNS if HOST_US in found.get(case, {})},
        launches={case: float(found[case][LAUNCHES]) for case in ABLATION_COLUMNS if LAUNCHES in found.get(case, {})},
        sources=tuple(sources),
    )


def padding_cost(study: Study, folder: Path) -> Padding | None:
    """None where the folder has no record of it."""
    record = _part(folder, "unseen")
    if record is None or not record["samples"]["first"]:
        return None
    first = {int(n): float(ms) for n, ms in record["samples"]["first"].items()}
    exact = {int(n): median(float(ms) for ms in several) for n, several in record["samples"]["exact"].items()}
    return Padding(first, exact, bool(record["emulated"]), _origin(study, record, "unseen"))


def _part(folder: Path, name: str) -> dict[str, Any] | None:
    """One part of the runtime's record.

    Raises:
        OutputError: it is there and damaged.
    """
    path = raw_path(folder, f"runtime-{name}.json")
    record = read_json(path)
    if record is not None and not {"samples", "environment", "model", "emulated"} <= record.keys():
        raise OutputError(f"{path} is no record of benchmarks/runtime.py: remove it or measure that part again")
    return record


def _origin(study: Study, record: Mapping[str, Any], part: str) -> str:
    """Where a figure comes from, and in what that differs from this run."""
    apart = differences(study.environment, record["environment"])
    if record["model"].get("name") != study.model.get("name"):
        apart.append(f"model: {study.model.get('name')} and {record['model'].get('name')}")
    emulated = ", emulated" if record["emulated"] else ""
    besides = f"; differing from this run in {'; '.join(apart)}" if apart else ""
    return f"from the runtime's own benchmark (raw/runtime-{part}.json{emulated}), not from these cases' run{besides}"


def _named(cases: Mapping[str, object]) -> str:
    return ", ".join(case for case in ABLATION_COLUMNS if case in cases)
