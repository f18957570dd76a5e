"""Checks a run's ``summary.json`` against the floors of release 0.1: ``python benchmarks/check_floors.py SUMMARY``.

Under each pacing that was measured: the hybrid beats the baseline in every cell (each prompt length, TTFT and P99),
its TTFT is at most 1.6 times the ``linears`` graph of the same length, its decode at most 1.5 times that graph at one
token. Prints each figure, writes ``figures.json`` beside the summary, and exits with 1 where a floor is missed or
cannot be checked.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TTFT_LIMIT = 1.6
DECODE_LIMIT = 1.5
LENGTHS = (10, 50, 100, 150, 200, 250, 300, 350, 400, 500)
Rows = dict[tuple[str, str, str, str, int], dict[str, Any]]


def check(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """One finding per figure: what, value, limit, whether it holds. A missing figure does not hold."""
    rows: Rows = {
        (row["case"], row["protocol"], row["metric"], row["pacing"], row["prompt_tokens"]): row
        for row in summary["rows"]
    }
    pacings = [p for p in ("interactive", "sustained") if any(key[0] == "hybrid" and key[3] == p for key in rows)]
    findings = []
    for pacing in pacings or ["interactive"]:
        for length in LENGTHS:
            findings += _cells(rows, pacing, length)
        findings += _decode(rows, pacing)
    flags = summary["ceiling"].get("flags", [])
    findings.append(
        {
            "what": "ceilings plausible for the device",
            "value": "; ".join(flags) or "yes",
            "limit": "yes",
            "holds": not flags,
        }
    )
    cut = sorted({f"{row['case']}: {note}" for row in summary["rows"] for note in row.get("notes", [])})
    findings.append(
        {"what": "rows without reservations", "value": "; ".join(cut) or "yes", "limit": "yes", "holds": not cut}
    )
    return findings


def _cells(rows: Rows, pacing: str, length: int) -> list[dict[str, Any]]:
    """The two cells of a length, and its distance from the matrix products alone."""

    def value(case: str, protocol: str, statistic: str) -> float | None:
        row = rows.get((case, protocol, "ttft_ms", pacing, length))
        return None if row is None else float(row[statistic])

    name = f"{pacing}, {length} tokens"
    ttft, p99 = value("hybrid", "ttft", "mean"), value("hybrid", "p99", "p99")
    return [
        _finding(
            f"{name}: hybrid TTFT below the baseline's", ttft, value("baseline", "ttft", "mean"), 1.0, strict=True
        ),
        _finding(f"{name}: hybrid P99 below the baseline's", p99, value("baseline", "p99", "p99"), 1.0, strict=True),
        _finding(f"{name}: hybrid TTFT against linears", ttft, value("linears", "ttft", "mean"), TTFT_LIMIT),
    ]


def _decode(rows: Rows, pacing: str) -> list[dict[str, Any]]:
    """Decode at each prompt length it was measured at."""
    linears = rows.get(("linears", "ttft", "ttft_ms", pacing, 1))
    found = [(key, row) for key, row in rows.items() if key[:4] == ("hybrid", "p99", "itl_ms", pacing)]
    base = None if linears is None else float(linears["mean"])
    if not found:
        return [_finding(f"{pacing}: hybrid decode against linears at one token", None, base, DECODE_LIMIT)]
    return [
        _finding(
            f"{pacing}, after {key[4]} tokens: hybrid decode against linears at one token",
            float(row["mean"]),
            base,
            DECODE_LIMIT,
        )
        for key, row in sorted(found)
    ]


def _finding(what: str, value: float | None, base: float | None, factor: float, strict: bool = False) -> dict[str, Any]:
    if value is None or base is None:
        return {"what": what, "value": value, "limit": None, "ratio": None, "holds": False}
    limit = base * factor
    return {
        "what": what,
        "value": value,
        "limit": limit,
        "ratio": value / base,
        "holds": value < limit if strict else value <= limit,
    }


def main() -> int:
    """Command entry."""
    if len(sys.argv) != 2:
        print("usage: python benchmarks/check_floors.py FOLDER/summary.json")
        return 2
    path = Path(sys.argv[1])
    if not path.is_file():
        print(f"{path} does not exist: run jitgraph bench first")
        return 2
    findings = check(json.loads(path.read_text(encoding="utf-8")))
    for finding in findings:
        mark = "ok  " if finding["holds"] else "MISS"
        ratio = finding.get("ratio")
        figures = (
            f"{finding['value']:.3f} ms, limit {finding['limit']:.3f} ms, ratio {ratio:.3f}"
            if ratio
            else f"{finding['value']}"
        )
        print(f"{mark} {finding['what']}: {figures}")
    missed = sum(not finding["holds"] for finding in findings)
    print(f"{len(findings) - missed} of {len(findings)} hold")
    path.with_name("figures.json").write_text(
        json.dumps({"findings": findings, "missed": missed}, indent=1) + "\n", encoding="utf-8"
    )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
