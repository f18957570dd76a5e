"""Which architecture the launches of this thread are for, so that wrappers may choose what only newer ones have."""

from __future__ import annotations

from functools import lru_cache

import torch

from jitgraph.config import interpreting
from jitgraph.jit.modes import ACTIVE_MODE


def target_arch() -> int:
    """Compute capability, 90 for 9.0: of the ``compile_only`` or ``collect`` block around where it names one, else of
    torch's current device; 0 under the interpreter and where there is no device."""
    mode = ACTIVE_MODE.get()
    if mode is not None and mode.arch is not None:
        return mode.arch
    if interpreting() or not torch.cuda.is_available():
        return 0
    return device_arch(torch.cuda.current_device())


@lru_cache
def device_arch(device: int) -> int:
    """Compute capability of a CUDA device, 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor
