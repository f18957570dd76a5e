"""The floors of release 0.1: the script's verdict on summaries that hold, miss, or lack a figure."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "check_floors.py"
LENGTHS = (10, 50, 100, 150, 200, 250, 300, 350, 400, 500)


def row(case: str, protocol: str, metric: str, tokens: int, value: float) -> dict[str, Any]:
    where = {"case": case, "protocol": protocol, "metric": metric, "pacing": "interactive", "prompt_tokens": tokens}
    return {**where, "mean": value, "p99": value, "notes": []}


def good() -> dict[str, Any]:
    rows = []
    for length in LENGTHS:
        for protocol in ("ttft", "p99"):
            rows += [
                row("hybrid", protocol, "ttft_ms", length, 6.0),
                row("baseline", protocol, "ttft_ms", length, 20.0),
            ]
        rows.append(row("linears", "ttft", "ttft_ms", length, 4.0))
    rows += [row("linears", "ttft", "ttft_ms", 1, 3.0), row("hybrid", "p99", "itl_ms", 10, 4.4)]
    return {"ceiling": {"flags": []}, "rows": rows}


def verdict(summary: dict[str, Any], folder: Path) -> tuple[int, str, dict[str, Any]]:
    path = folder / "summary.json"
    path.write_text(json.dumps(summary))
    done = subprocess.run([sys.executable, str(SCRIPT), str(path)], capture_output=True, text=True, check=False)
    figures = json.loads((folder / "figures.json").read_text())
    return done.returncode, done.stdout, figures


def test_a_run_over_all_floors_passes(tmp_path: Path) -> None:
    code, shown, figures = verdict(good(), tmp_path)
    assert code == 0 and figures["missed"] == 0
    assert len(figures["findings"]) == 3 * len(LENGTHS) + 3 and "33 of 33 hold" in shown


def test_each_missed_floor_fails(tmp_path: Path) -> None:
    changes = [
        ("hybrid", "ttft", "ttft_ms", 50, 6.5, "hybrid TTFT against linears"),
        ("baseline", "p99", "ttft_ms", 500, 6.0, "hybrid P99 below the baseline's"),
        ("hybrid", "p99", "itl_ms", 10, 4.6, "hybrid decode against linears"),
    ]
    for case, protocol, metric, tokens, value, what in changes:
        summary = copy.deepcopy(good())
        for one in summary["rows"]:
            if (one["case"], one["protocol"], one["metric"], one["prompt_tokens"]) == (case, protocol, metric, tokens):
                one["mean"] = one["p99"] = value
        code, shown, figures = verdict(summary, tmp_path)
        assert code == 1 and figures["missed"] == 1
        assert [line for line in shown.splitlines() if line.startswith("MISS") and what in line]


def test_a_missing_figure_and_a_flagged_ceiling_fail(tmp_path: Path) -> None:
    summary = good()
    summary["rows"] = [one for one in summary["rows"] if one["metric"] != "itl_ms"]
    summary["ceiling"]["flags"] = ["read rate too low"]
    code, shown, figures = verdict(summary, tmp_path)
    assert code == 1 and figures["missed"] == 2 and "MISS ceilings plausible for the device: read rate too low" in shown
