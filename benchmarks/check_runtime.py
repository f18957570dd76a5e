"""Checks ``runtime.json`` against its floors: ``python benchmarks/check_runtime.py FOLDER/runtime.json``.

The figures are taken from the raw files beside it once more, so that a figure nobody measured cannot pass. Prints each
floor, and exits with 1 where one is missed, where a figure is missing, or where ``runtime.json`` does not follow from
its raw files.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(arguments: list[str]) -> int:
    """Command entry."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installed package
    from runtime_parts import record, show

    from jitgraph.errors import JitgraphError

    if len(arguments) != 1:
        print("usage: python benchmarks/check_runtime.py FOLDER/runtime.json")
        return 2
    path = Path(arguments[0])
    if not path.is_file():
        print(f"{path} does not exist: run benchmarks/runtime.py first")
        return 2
    try:
        raw = record.read_raw(path.parent)
    except JitgraphError as error:
        print(error)
        return 2
    found = json.loads(path.read_text(encoding="utf-8"))
    if not raw or found != json.loads(json.dumps(record.merged(raw))):
        print(f"MISS {path} does not follow from {path.parent}/raw: run benchmarks/runtime.py --merge")
        return 1
    for line in show.verdicts(found):
        print(line)
    missed = sum(not finding["holds"] for finding in found["floors"])
    print(f"{len(found['floors']) - missed} of {len(found['floors'])} hold")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
