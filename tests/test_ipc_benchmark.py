"""``benchmarks/ipc.py``: it runs, and its figures follow from its raw samples."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import ipc  # noqa: E402

COUNTS = {"requests": 20, "paused": 3, "decodes": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The channel's part for real: the service of the engine process around an engine without a model."""
    folder = tmp_path_factory.mktemp("ipc")
    counts = [word for name, n in COUNTS.items() for word in (f"--{name}", str(n))]
    command = [sys.executable, str(ROOT / "benchmarks" / "ipc.py"), "--channel-only", "--device", "cpu", *counts]
    done = subprocess.run([*command, "--output", str(folder)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "ipc_ttft_us_p50" in done.stdout and "Client: first token after 50 ms" in done.stdout
    return folder


def test_figures_follow_from_the_samples(folder: Path) -> None:
    raw = json.loads((folder / "raw" / "ipc.json").read_text())
    samples = raw["channel"]["samples"]
    assert len(samples["sync_ttft"]) == len(samples["here_ttft"]) == 20 and len(samples["async_ttft_paused"]) == 3
    assert len(samples["sync_gap"]) == 2 * 31 and min(samples["sync_delay"]) > 0
    assert min(samples["sync_ttft"]) > min(samples["here_ttft"]) > 0
    found = json.loads((folder / "ipc.json").read_text())
    assert found == ipc.figures(raw) and found["figures_from"] == "channel"
    assert set(found["figures"]) == set(ipc.FLOORS)


def test_where_the_figures_come_from() -> None:
    """From two engines with a model where that means something: apart less here, each percentile of its own."""
    samples = {"here_ttft": [1000.0, 1010.0], "apart_ttft": [1100.0, 1210.0], "here_itl": [5.0], "apart_itl": [7.5]}
    raw = {"channel": {"samples": {}}, "engines": {"emulated": False, "samples": samples}}
    found = ipc.figures(raw)
    assert found["figures_from"] == "engines"
    assert found["figures"]["ipc_ttft_us_p50"] == pytest.approx(1155 - 1005)
    assert found["figures"]["ipc_ttft_us_p99"] == pytest.approx((1100 + 0.99 * 110) - (1000 + 0.99 * 10))
    assert found["figures"]["ipc_token_us_p50"] == pytest.approx(2.5)
