"""Part *ready*: from the start of a process to an engine that answers, without the loading of weights, with an empty
kernel cache and with one that the run before has filled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from runtime_parts.lab import Lab, Result

CHILD = Path(__file__).resolve().with_name("ready_child.py")
TIMEOUT_S = 240


def ready(lab: Lab) -> Result:
    """One cold start, then warm ones from the same caches; each in a process of its own."""
    lab.close()
    cold: list[float] = []
    warm: list[float] = []
    children = []
    with tempfile.TemporaryDirectory(prefix="jitgraph-caches-") as caches:
        for index in range(1 + lab.scale.ready_warm):
            child = start(lab, Path(caches))
            (warm if index else cold).append(child["ready_s"])
            children.append(child)
            lab.say(f"  {'warm' if index else 'cold'}: {child['ready_s']:.2f} s")
    return Result(samples={"cold_s": cold, "warm_s": warm}, counters={"children": children})


def start(lab: Lab, caches: Path) -> dict[str, Any]:
    """Starts a process whose caches of compiled code all lie in ``caches``; what it reports."""
    plan = lab.plan
    request = {"started_s": time.time(), "model": plan.model, "weights": plan.weights, "seed": plan.seed}
    request |= {"device": plan.device, "dtype": plan.dtype}
    own = {"JITGRAPH_CACHE": "jitgraph", "TRITON_CACHE_DIR": "triton", "CUDA_CACHE_PATH": "cuda"}
    environment = {**os.environ, **{name: str(caches / folder) for name, folder in own.items()}}
    command = [sys.executable, str(CHILD), json.dumps(request)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    if done.returncode != 0:
        raise RuntimeError(f"an engine's process failed: {done.stderr[-2000:]}")
    reported: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return reported
