"""Puts the figures of a record into the documents that quote them: ``python benchmarks/quote.py [FOLDER]``.

``FOLDER`` (``benchmarks/h200`` where none is named) has ``runtime.json`` and, from the five cases, ``summary.json``.
What the paper's repository shows stands in ``benchmarks/published.json``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (
    "README.md",
    "docs/research.md",
    "docs/from_the_paper.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs" / "approaches").glob("*.md")),
)


def main(arguments: list[str]) -> int:
    """Command entry."""
    sys.path.insert(0, str(ROOT))
    from runtime_parts.quotes import fill

    folder = Path(arguments[0]) if arguments else ROOT / "benchmarks" / "h200"
    record, summary = (_read(folder / name) for name in ("runtime.json", "summary.json"))
    if not record:
        print(f"{folder} has no runtime.json: run benchmarks/runtime.py first")
        return 2
    if record["emulated"] or record["quick"]:
        print(f"{folder} is no measurement (quick, or on the CPU): documents quote full runs on a GPU alone")
        return 2
    published = _read(ROOT / "benchmarks" / "published.json")
    for name in DOCUMENTS:
        path = ROOT / name
        before = path.read_text(encoding="utf-8")
        after = fill(before, record, summary, published)
        path.write_text(after, encoding="utf-8")
        print(f"{name}: {'changed' if after != before else 'as it was'}")
    return 0


def _read(path: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
