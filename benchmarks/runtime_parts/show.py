"""What the terminal shows of a record: figures, floors, whether they hold. Plain text, no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from runtime_parts.floors import FLOORS


def lines(record: Mapping[str, Any]) -> Iterator[str]:
    """A line for each figure that was measured, with its floor where it has one."""
    if record["emulated"]:
        yield "Emulated: on the CPU plain PyTorch stands in for kernels and graphs; no figure tells of a GPU."
    if record["quick"]:
        yield "Quick: too few samples for any figure to count."
    judged = not record["emulated"] and not record["quick"]
    limits = {floor.figure: floor for floor in FLOORS}
    held = {finding["figure"]: finding["holds"] for finding in record["floors"]}
    for name, value in entries(record["figures"]):
        floor = limits.get(name) if judged else None
        verdict = "" if floor is None else f"{floor.relation} {floor.limit:g}   {'ok' if held[name] else 'MISS'}"
        yield f"{name:<42} {number(value):>12}   {verdict}".rstrip()


def verdicts(record: Mapping[str, Any]) -> Iterator[str]:
    """A line for each floor."""
    for finding in record["floors"]:
        value = "not measured" if finding["value"] is None else number(finding["value"])
        yield f"{'ok  ' if finding['holds'] else 'MISS'} {finding['figure']}: {value}, floor {finding['limit']}"


def entries(figures: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name or name.entry, value) of every figure."""
    for name, value in figures.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{entry}", one) for entry, one in value.items())
        else:
            yield name, value


def number(value: Any) -> str:
    """Four digits, or all of a whole number."""
    if isinstance(value, bool):
        return str(value)
    return f"{value:.4g}" if isinstance(value, float) and not value.is_integer() else f"{value:,.0f}"
