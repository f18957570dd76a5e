"""Whether ``jitgraph bench serve`` and NVIDIA's AIPerf agree: ``python benchmarks/load_agreement.py --aiperf PATH``.

Both measure a server that sends tokens on a fixed schedule (``load_parts/fixed_server.py``): the truth is known. Two
questions: are the medians of the two runs the same, and does this project make the same figures, throughput too, of
AIPerf's own requests? Throughput of two runs is shown and not judged: in a closed loop it holds the time that a tool
takes from one answer to the next request. Schedules are slow beside what a busy machine adds to a latency.

Prints a table and writes ``benchmarks/load_agreement.json``. Exit code 1 where something judged is more than 2 % apart.
AIPerf pins many versions: give it an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from load_parts.tools import FIGURES, MEDIANS, Condition, deviations, measure

RECORD = Path(__file__).with_name("load_agreement.json")
TOLERANCE = 0.02
CONDITIONS = (
    Condition(ttft_ms=400, gap_ms=20, tokens=50, concurrency=1, requests=12),
    Condition(ttft_ms=500, gap_ms=20, tokens=50, concurrency=4, requests=24),
    Condition(ttft_ms=1000, gap_ms=40, tokens=40, concurrency=8, requests=24, chat=True),
)


def compare(condition: Condition, aiperf: str) -> dict[str, Any]:
    """One condition's part of the record."""
    with tempfile.TemporaryDirectory() as folder:
        found = measure(condition, aiperf, Path(folder))
    return {"condition": asdict(condition), "schedule": condition.truth(), **found}


def verdicts(record: dict[str, Any]) -> list[dict[str, Any]]:
    """What a record says of each condition: the deviations, and whether all that is judged agrees."""
    said = []
    for row in record["rows"]:
        apart = deviations(row, row["schedule"])
        judged = [*(apart["jitgraph_from_aiperf"][name] for name in MEDIANS), *apart["of_same_samples"].values()]
        said.append({**apart, "agree": all(abs(share) <= TOLERANCE for share in judged)})
    return said


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--aiperf", default=shutil.which("aiperf"), help="the command (default: the one on PATH)")
    parser.add_argument("--output", type=Path, default=RECORD)
    options = parser.parse_args()
    if options.aiperf is None:
        parser.error("aiperf is not on PATH: pip install aiperf into an environment of its own, and give --aiperf PATH")
    version = subprocess.run([options.aiperf, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    record: dict[str, Any] = {"aiperf": version, "rows": [compare(one, options.aiperf) for one in CONDITIONS]}
    said = verdicts(record)
    print(f"{'':<24}{'schedule':>12}{'jitgraph':>12}{'aiperf':>12}{'apart':>9}{'same samples':>14}")
    for row, one in zip(record["rows"], said, strict=True):
        print(", ".join(f"{name} {value}" for name, value in row["condition"].items()))
        for name in FIGURES:
            cells = "".join(f"{row[who][name]:>12.2f}" for who in ("schedule", "jitgraph", "aiperf"))
            print(f"  {name:<22}{cells}{one['jitgraph_from_aiperf'][name]:>9.2%}{one['of_same_samples'][name]:>14.2%}")
    agree = all(one["agree"] for one in said)
    options.output.write_text(json.dumps({**record, "agree": agree}, indent=2) + "\n", encoding="utf-8")
    print("the tools agree" if agree else f"more than {TOLERANCE:.0%} apart")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
