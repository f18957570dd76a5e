"""A run's record: a raw file for each part, and ``runtime.json``, which follows from them. No torch.

``raw/runtime-PART.json`` holds a part's samples, counters and conditions with the environment they were made in, so
that parts may be run one by one. Only parts of one environment, model and scale stand in one ``runtime.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jitgraph.bench.environment import differences
from jitgraph.bench.floors import Floors, ceilings
from jitgraph.bench.records import raw_path, read_json, write_json, write_text
from jitgraph.errors import OutputError
from runtime_parts.figures import figures, linears_ms
from runtime_parts.floors import findings

SCHEMA = 1
PREFIX = "runtime-"
Raw = Mapping[str, Mapping[str, Any]]
"""Part to what its raw file holds."""


def rounded(value: Any) -> Any:
    """Floats to four digits after the point (in milliseconds a tenth of a microsecond), small ones to six."""
    if isinstance(value, float):
        return round(value, 4 if abs(value) >= 0.1 else 6)
    if isinstance(value, dict):
        return {str(name): rounded(one) for name, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, (list, tuple)) else value


def write_raw(folder: Path, part: str, record: Mapping[str, Any]) -> None:
    """Writes a part's raw file, compact.

    Raises:
        OutputError: the folder cannot be written.
    """
    write_text(
        raw_path(folder, f"{PREFIX}{part}.json"), json.dumps(rounded(dict(record)), separators=(",", ":")) + "\n"
    )


def read_raw(folder: Path) -> dict[str, dict[str, Any]]:
    """Every part's raw record, by part.

    Raises:
        OutputError: a damaged file.
    """
    found = {}
    for path in sorted((folder / "raw").glob(f"{PREFIX}*.json")):
        record = read_json(path)
        assert record is not None
        found[path.stem.removeprefix(PREFIX)] = record
    return found


def check_same(folder: Path, identity: Mapping[str, Any]) -> None:
    """That parts which the folder holds already were made under the same conditions as those to come.

    Raises:
        OutputError: they were not; nothing may be added.
    """
    for part, record in read_raw(folder).items():
        why = differences(record["environment"], identity["environment"])
        for name in ("model", "quick"):
            if record[name] != identity[name]:
                why.append(f"{name}: {record[name]} and {identity[name]}")
        if why:
            raise OutputError(
                f"{folder} holds {part} of another run ({'; '.join(why)}): choose another --output, or remove "
                f"{folder}/raw/{PREFIX}*.json"
            )


def merged(raw: Raw) -> dict[str, Any]:
    """``runtime.json`` from raw records; nothing else goes into it."""
    first = next(iter(raw.values()))
    found = figures(raw)
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "environment": first["environment"],
        "model": first["model"],
        "emulated": first["emulated"],
        "quick": first["quick"],
        "parts": {
            part: {name: one[name] for name in ("seconds", "conditions", "counters")}
            for part, one in sorted(raw.items())
        },
        "ceiling": _ceiling(raw, first),
        "figures": found,
    }
    return {**record, "floors": findings(record)}


def _ceiling(raw: Raw, first: Mapping[str, Any]) -> dict[str, Any]:
    products = linears_ms(raw)
    rates = raw["ceiling"]["samples"] if "ceiling" in raw else {}
    measured = {("interactive", int(tokens)): ms for tokens, ms in products.items()}
    name = str(first["environment"]["device_name"])
    return rounded({**ceilings(rates, Floors.from_model(first["model"]), measured, name), "linears_ms": products})  # type: ignore[no-any-return]


def merge(folder: Path) -> dict[str, Any]:
    """Reads every part, writes ``runtime.json``, and returns it.

    Raises:
        OutputError: there is no part, parts of different runs lie there, or the folder cannot be written.
    """
    raw = read_raw(folder)
    if not raw:
        raise OutputError(f"{folder} holds no part of this benchmark")
    check_same(folder, next(iter(raw.values())))
    record = merged(raw)
    write_json(folder / "runtime.json", record)
    return record
