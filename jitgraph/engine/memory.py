"""How much memory of a device is in use, for reports of what getting ready took. Any thread."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

_STATM = Path("/proc/self/statm")


def used_bytes(device: torch.device) -> int:
    """Bytes in use: on a GPU whoever uses them, on the CPU those of this process."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(total - free)
    if not _STATM.exists():
        return 0
    return int(_STATM.read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def peak_bytes(device: torch.device) -> int:
    """The most that this process has used: of PyTorch's memory on a GPU, of the machine's on the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
