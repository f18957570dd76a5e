"""What the service survives: ``python benchmarks/reliability.py [--output FILE] [--parts a,b] [--minutes M] ...``.

Runs ``jitgraph serve`` as users do, breaks it on purpose, and compares every answer with ``LLM``'s. Each part writes
its figures into FILE (``benchmarks/reliability.json``) as it ends, so parts may be run one by one; then all figures
are checked against their floors. Exits with 1 where a part failed or a floor is missed. ``--check`` runs nothing and
checks what is there.

The model ``tiny`` on the CPU serves for all but a GPU's memory: ``--device cuda`` for that. The latency that a process
of its own adds is taken over from a record of ``benchmarks/ipc.py``.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> int:
    """Command entry; works without an installed package."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from reliability_parts.command import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
