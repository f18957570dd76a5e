"""Entry of the engine process behind ``LLM(..., isolated=True)``: the settings come as one JSON argument.

``run_isolated`` is all that the process does; its parent, another process, makes the argument with ``arguments``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from jitgraph.config import EngineConfig
from jitgraph.engine.worker import Worker, WorkerOptions
from jitgraph.errors import JitgraphError

USAGE = 2
"""Exit code for settings that cannot work."""


def arguments(model: str, weights: str, seed: int, settings: dict[str, Any]) -> str:
    """The argument of an engine process; ``settings`` are fields of ``EngineConfig``."""
    return json.dumps({"model": model, "weights": weights, "seed": seed, "settings": settings})


def run_isolated(argv: list[str]) -> int:
    """``ARGUMENT --socket PATH``: serves until told to end; the exit code."""
    asked, _, socket = argv
    given = json.loads(asked)
    options = WorkerOptions(
        given["model"],
        Path(socket),
        weights=given["weights"],
        seed=given["seed"],
        config=EngineConfig(**given["settings"]),
        parent=os.getppid(),
    )
    try:
        return Worker(options).run()
    except JitgraphError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
