"""What the machine and its software are, for the record of a run. Imports torch when called, creates no CUDA graph."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

IDENTITY = (
    "device_name",
    "device_kind",
    "cpu",
    "cores",
    "driver",
    "cuda",
    "python",
    "torch",
    "triton",
    "transformers",
    "jitgraph",
)
"""What must agree for two results to stand in one table."""
_PACKAGES = ("torch", "triton", "transformers", "tokenizers", "numpy", "cuda-bindings")


def collect_environment(device: str) -> dict[str, Any]:
    """Facts about the machine, the device (``cuda:0``, ``cpu``) and the versions that matter to a latency."""
    import torch

    import jitgraph

    found: dict[str, Any] = {
        "device": device,
        "device_kind": device.partition(":")[0],
        "device_name": f"CPU ({cpu_name()})",
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        "python": platform.python_version(),
        "jitgraph": jitgraph.__version__,
        **{name: package_version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
        "driver": None,
        "torch_threads": torch.get_num_threads(),
    }
    if found["device_kind"] == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device_name": properties.name,
            "device_memory_gib": round(properties.total_memory / 2**30, 1),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "driver": driver_version(),
            "device_uuid": f"GPU-{properties.uuid}",
            "device_free_gib": round(torch.cuda.mem_get_info(device)[0] / 2**30, 1),
        }
    return found


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Why results of two environments do not belong in one table; empty where they do."""
    return [f"{name}: {one.get(name)} and {other.get(name)}" for name in IDENTITY if one.get(name) != other.get(name)]


def package_version(name: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    """Model name as Linux tells it, else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.lower().startswith("model name")]
    return names[0] if names else platform.machine()


def driver_version() -> str | None:
    """NVIDIA's kernel driver, from the file it publishes."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").split()
    except OSError:
        return None
    numbers = [word for word in words if word[:1].isdigit() and "." in word]
    return numbers[0] if numbers else None
