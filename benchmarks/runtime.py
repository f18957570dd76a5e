"""The proof of the runtime, measured in process: ``python benchmarks/runtime.py --output FOLDER [--parts a,b]``.

Llama-2-7B shapes with random weights in fp16, batch 1, a pause of 50 ms before each request and before whatever a
figure is divided by. Each part writes ``FOLDER/raw/runtime-PART.json``; several commands may run them, and at the end
of each ``FOLDER/runtime.json`` is made of all that are there (``--merge`` does that alone). ``check_runtime.py``
compares it with the floors.

``--quick --model tiny --device cpu`` runs every part in well under a minute, with figures that mean nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> int:
    """Command entry; works without an installed package."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from runtime_parts.command import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
