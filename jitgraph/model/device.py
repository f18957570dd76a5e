"""Names of devices and dtypes to PyTorch's own. Called before anything is loaded; makes no CUDA context itself."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from jitgraph.config import DTYPES
from jitgraph.errors import CapacityError, ConfigError, DeviceError


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """The device that ``auto``, ``cpu``, ``cuda`` or ``cuda:1`` means; always with an index on CUDA.

    Raises:
        DeviceError: not such a name, CUDA without a usable CUDA device, or an index past the last one.
    """
    text = str(name)
    if text == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    kind, _, index = text.partition(":")
    if text == "cpu":
        return torch.device("cpu")
    if kind != "cuda" or (index or "0") not in {str(n) for n in range(1024)} or text.endswith(":"):
        raise DeviceError(f"device must be auto, cpu, cuda or cuda:N, not {text!r}")
    if not torch.cuda.is_available():
        why = "PyTorch sees no CUDA device" if torch.version.cuda else "this PyTorch is built without CUDA"
        raise DeviceError(
            f"device {text!r} was asked for but {why}: use device 'cpu', or install a driver and a CUDA build"
        )
    number, count = int(index or 0), torch.cuda.device_count()
    if number >= count:
        raise DeviceError(f"device {text!r} does not exist: this machine has cuda:0 to cuda:{count - 1}")
    return torch.device("cuda", number)


def check_memory(need_bytes: int, device: torch.device, what: str, advice: str) -> None:
    """Refuses what the machine cannot hold before it is asked for. A CUDA allocation fails cleanly by itself; Linux
    grants any on the CPU and kills the process later.

    Raises:
        CapacityError: more than is free; the message has both figures.
    """
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return
    free = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
    if free is not None and need_bytes > int(free.group(1)) * 1024:
        raise CapacityError(
            f"{what} need {need_bytes / 2**30:.2f} GiB but only {int(free.group(1)) / 2**20:.2f} GiB of memory are "
            f"free: {advice}"
        )


def resolve_dtype(name: str, own: str, device: torch.device) -> torch.dtype:
    """The dtype to compute in; ``auto`` is the checkpoint's ``own`` on CUDA and float32 on the CPU.

    Raises:
        ConfigError: not one of ``config.DTYPES``.
    """
    if name not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, not {name!r}")
    if name == "auto":
        name = own if device.type == "cuda" else "float32"
    return torch_dtype(name)


def torch_dtype(name: str) -> torch.dtype:
    """PyTorch's dtype of ``float16``, ``bfloat16`` or ``float32``."""
    return {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}[name]
