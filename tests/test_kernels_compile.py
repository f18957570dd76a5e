"""Every Triton kernel compiles for sm_80 and sm_90, in each dtype and for each family's geometry, without a GPU.

Each architecture is a process of its own, as many at once as there are cores. Register spills are 0 but for
the kernels listed here, and every block fits the smallest shared memory of a supported card.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

ARCHS = (80, 90)
DTYPES = ("float32", "float16", "bfloat16")

SHARED_LIMIT_BYTES = {80: 99 * 1024, 90: 227 * 1024}
"""Per block, the least of the cards that get a kernel in this form: 8.6 and 8.9 get it as 8.0 does, while 9.0 has
products of its own, which keep one block of keys and values more."""

STACK_BOUND_BYTES = {
    "chunk_attention_kernel": 40,  # ten registers on sm_80, as below
    "prefill_attention_kernel": 32,  # two registers on sm_80, where the products' operands pass through registers
    "rope_prefill_attention_kernel": 16,  # up to four registers, around the exchange of shared sums
    "rope_append_kernel": 64,  # the sine's slow path for large angles (dynamic scaling)
}


def _compile(arch: int, cache: Path) -> dict[str, Any]:
    environment = os.environ | {"TRITON_INTERPRET": "0", "JITGRAPH_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    environment["TRITON_DISABLE_LINE_INFO"] = "1"  # a tenth quicker; the instructions are the same
    environment.pop("TRITON_CACHE_DIR", None)
    here = Path(__file__).parent
    environment["PYTHONPATH"] = os.pathsep.join([str(here.parent), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(here / "kernel_cases.py"), str(arch)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"sm_{arch}:\n{done.stderr}"
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], dict[str, Any]]:
    """The report of each (architecture, dtype)."""
    cache = tmp_path_factory.mktemp("kernels")
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        reports = dict(zip(ARCHS, pool.map(lambda arch: _compile(arch, cache), ARCHS), strict=True))
    return {(arch, dtype): reports[arch][dtype] for arch in ARCHS for dtype in DTYPES}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_compiles(compiled: dict[tuple[int, str], dict[str, Any]], arch: int, dtype: str) -> None:
    report = compiled[arch, dtype]
    assert sorted(report["ops"]) == report["wanted_ops"]
    assert all(report["ops"].values()), "an op that launches no kernel"
    launched = {binary["kernel"] for binary in report["binaries"]}
    assert launched == set(report["wanted_kernels"])


@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ARCHS)
def test_registers_and_shared_memory(compiled: dict[tuple[int, str], dict[str, Any]], arch: int, dtype: str) -> None:
    for binary in compiled[arch, dtype]["binaries"]:
        name = f"sm_{arch} {binary['kernel']}({binary['signature']})"
        assert binary["registers"] is not None and binary["local_bytes"] is not None, name
        bound = STACK_BOUND_BYTES.get(binary["kernel"].rsplit(".", 1)[-1], 0)
        assert binary["local_bytes"] <= bound, f"{name} keeps {binary['local_bytes']} bytes in local memory"
        assert binary["shared_bytes"] <= SHARED_LIMIT_BYTES[arch], f"{name} needs {binary['shared_bytes']} bytes shared"
