"""Picks the implementation of every op once, and says which.

``torch``: the reference everywhere. ``mixed``: Triton for what changes from step to step (preparation, RoPE + KV
append, attention with its masks, sampling, append), PyTorch for the static rest. ``jit``: Triton for all but matrix
products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch

from jitgraph.config import interpreting
from jitgraph.errors import DeviceError
from jitgraph.ops import reference, reference_sampling

Op = Callable[..., None]


@dataclass(frozen=True)
class Ops:
    """One implementation of each op; signatures and meaning are those of ``reference*.py``."""

    flavour: str
    prepare_prefill: Op
    prepare_decode: Op
    embed: Op
    rms_norm: Op
    add_rms_norm: Op
    linear: Op
    silu_mul: Op
    rope_append: Op
    prefill_attention: Op
    decode_attention: Op
    greedy: Op
    sample: Op
    advance: Op

    def describe(self) -> dict[str, str]:
        """Op name to the module that implements it."""
        ops = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "flavour"}
        return {name: op.__module__.rsplit(".", 1)[-1] for name, op in ops.items()}


STATIC_OPS = ("embed", "rms_norm", "add_rms_norm", "linear", "silu_mul")
"""The same computation every step, whatever the request; the others are dynamic."""


def select_ops(flavour: str, device: torch.device) -> Ops:
    """The ops of a flavour (``auto`` included) on a device.

    Raises:
        DeviceError: a Triton flavour on the CPU without the interpreter.
    """
    if flavour == "auto":
        flavour = "jit" if device.type == "cuda" else "torch"
    names = [f.name for f in fields(Ops) if f.name != "flavour"]
    sampling_ops = ("greedy", "sample", "advance")
    chosen: dict[str, Any] = {
        name: getattr(reference_sampling if name in sampling_ops else reference, name) for name in names
    }
    if flavour == "torch":
        return Ops(flavour=flavour, **chosen)
    if device.type != "cuda" and not interpreting():
        raise DeviceError(f"ops={flavour!r} needs a CUDA device; on the CPU use ops='torch'")
    from jitgraph.ops import attention, elementwise, sampling  # Triton is not needed, nor always there, on a CPU

    for module in (elementwise, attention, sampling):
        for name in names:
            if hasattr(module, name) and (flavour == "jit" or name not in STATIC_OPS):
                chosen[name] = getattr(module, name)
    return Ops(flavour=flavour, **chosen)


def kernel_workspace(ops: Ops, max_model_len: int, kv_heads: int, vocab_size: int) -> tuple[int, int]:
    """(splits of the keys in decode attention, float32 words of sampling scratch per row) that the chosen ops need."""
    if ops.flavour == "torch":
        return 1, 1
    from jitgraph.ops.attention import decode_splits
    from jitgraph.ops.sampling import scratch_words

    return decode_splits(max_model_len, kv_heads), scratch_words(vocab_size)
