"""The compile registry: many kernels at once, a disk cache that heals itself, and nothing compiled after ready.

What needs Triton's compiler runs in processes of their own, as ``jit_registry_cases.py`` and ``jit_launch_cases.py``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from jitgraph.errors import CompileError
from jitgraph.jit.collect import collect
from jitgraph.jit.monitor import CompileMonitor
from jitgraph.jit.registry import compile_all
from jitgraph.jit.strict import forbid_compiles

CASES = [
    ("registry", "parallel_is_serial"),
    ("registry", "heals"),
    ("registry", "collects_what_runs", "unwritable", "triton_is_left_alone", "failure", "without_bindings"),
    ("launch", "launches", "launch_keys", "constant_keys", "threads", "driver_errors"),
]
"""Script, then the cases that one process of it runs."""


def start(folder: Path, script: str, *cases: str, **environment: str) -> subprocess.Popen[str]:
    surroundings = os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1", "HOME": str(folder)} | environment
    surroundings.pop("TRITON_CACHE_DIR", None)
    here = Path(__file__).parent
    surroundings["PYTHONPATH"] = os.pathsep.join([str(here.parent), surroundings.get("PYTHONPATH", "")])
    command = [sys.executable, str(here / f"jit_{script}_cases.py"), str(folder), *cases]
    return subprocess.Popen(command, env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate()
    assert process.returncode == 0, out + err
    return out


@pytest.mark.parametrize("words", CASES, ids=" ".join)
def test_case(words: tuple[str, ...], tmp_path: Path) -> None:
    finish(start(tmp_path, *words))
    assert not (tmp_path / ".triton").exists(), "Triton's own cache must stay untouched"


def test_processes_share_what_they_compile(tmp_path: Path) -> None:
    """Two processes that compile the same at once do not disturb each other, and a third one compiles nothing, though
    Python hashes differently in each."""
    pair = [start(tmp_path, "registry", "write", PYTHONHASHSEED=seed) for seed in ("1", "2")]
    for process in pair:
        total, hits, compiled, damaged, unwritable, bypassed = json.loads(finish(process))
        assert total == hits + compiled == 8 and not damaged and not unwritable and not bypassed
    third = json.loads(finish(start(tmp_path, "registry", "write", PYTHONHASHSEED="3")))
    assert third == [8, 8, 0, 0, 0, 0]
    assert not list((tmp_path / "write" / "kernels").glob(".*"))


@pytest.mark.gpu
def test_what_is_collected_and_compiled_launches_at_once() -> None:
    import jit_cases

    from jitgraph.jit.kernel import Kernel

    monitor = CompileMonitor()
    own = Kernel(jit_cases.add_body, monitor)
    x, y = (torch.randn(64, device="cuda") for _ in range(2))
    out = torch.zeros(64, device="cuda")

    def steps() -> None:
        for n in (64, 33, 1):
            own[(1,)](x, y, out, n, 0.5, None, BLOCK=64)

    with collect() as wanted:
        steps()
    assert not out.any()
    summary = compile_all(wanted, torch.device("cuda", 0))
    assert summary.total == summary.hits + summary.compiled == monitor.count == 3
    with forbid_compiles("after ready"):
        steps()
        torch.testing.assert_close(out, x + y * 0.5)
        with pytest.raises(CompileError, match="was not compiled before ready: add_body"):
            own[(1,)](x[1:], y, out, 33, 0.5, None, BLOCK=64)
    assert monitor.count == 3 and compile_all(wanted, torch.device("cuda", 0)).ready_before == 3
