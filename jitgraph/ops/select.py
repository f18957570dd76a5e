"""Picks the implementation of every op once, and says which.

``torch``: the reference everywhere. ``mixed``: Triton for what changes from step to step (preparation, RoPE + KV
append, attention with its masks, sampling, append), PyTorch for the static rest. ``jit``: Triton for all but the large
matrix products, which cuBLAS does. ``jit-all``: Triton for those as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from jitgraph.config import interpreting
from jitgraph.errors import DeviceError
from jitgraph.ops import reference, reference_attention, reference_linear, reference_sampling

if TYPE_CHECKING:
    from jitgraph.ops.products import TunedProducts

Op = Callable[..., Any]


@dataclass(frozen=True)
class Ops:
    """One implementation of each op; signatures and meaning are those of ``reference*.py``."""

    flavour: str
    invariant: bool
    """Whether a row's bits depend on its own position and data alone: not on T, padding or neighbours."""
    receive: Op
    prepare_prefill: Op
    prepare_decode: Op
    embed: Op
    norm_linear: Op
    linear_add: Op
    norm_gated: Op
    rope_append: Op
    prefill_attention: Op
    decode_attention: Op
    note_prompt: Op
    greedy: Op
    sample: Op
    score: Op
    advance: Op
    rope_prefill_attention: Op | None = None
    """``rope_append`` and ``prefill_attention`` of a chunk in one; None where it gains nothing or changes a row's sums
    with the shape, in the batch-invariant mode. Not every model may use it: ``model/decoder.py`` decides."""
    chunk_attention: Op | None = None
    """``prefill_attention`` of a chunk that ``rope_append`` has left in qkv; None as above."""
    tuned_counts: tuple[int, ...] = ()
    """Prompt sizes at which a measurement chose kernels that no other size needs."""

    def describe(self) -> dict[str, str]:
        """Op name to the module that implements it."""
        ops = {name: getattr(self, name) for name in op_names()}
        found = {name: op for name, op in ops.items() if op is not None}
        return {name: getattr(op, "func", op).__module__.rsplit(".", 1)[-1] for name, op in found.items()}

    @property
    def receives_on_device(self) -> bool:
        """Whether ``receive`` reads its launch's number on the device, so that a graph may contain it."""
        return self.flavour != "torch"


def op_names() -> list[str]:
    """The names of all ops."""
    return [f.name for f in fields(Ops) if f.name not in ("flavour", "invariant", "tuned_counts")]


STATIC_OPS = ("embed", "norm_linear", "linear_add", "norm_gated")
"""The same computation every step, whatever the request; the others are dynamic."""


def select_ops(flavour: str, device: torch.device, invariant: bool = False) -> Ops:
    """The ops of a flavour (``auto`` included) on a device.

    ``invariant`` binds the batch-invariant variants: of an op ``x``, the function ``invariant_x`` of the same module
    where there is one; the others are batch-invariant as they are.

    Raises:
        DeviceError: a Triton flavour on the CPU without the interpreter; the batch-invariant mode on a CUDA device with
            PyTorch's ops, which choose their order of summation by shape.
    """
    if flavour == "auto":
        flavour = "jit" if device.type == "cuda" else "torch"
    if invariant and device.type == "cuda" and flavour not in ("jit", "jit-all"):
        raise DeviceError(f"the batch-invariant mode needs ops='jit' on a CUDA device, not {flavour!r}")
    names = op_names()
    chosen: dict[str, Any] = {}
    for module in (reference, reference_linear, reference_attention, reference_sampling):
        chosen |= _implementations(module, names, invariant)
    if flavour == "torch":
        return Ops(flavour=flavour, invariant=invariant, **chosen)
    if device.type != "cuda" and not interpreting():
        raise DeviceError(f"ops={flavour!r} needs a CUDA device; on the CPU use ops='torch'")
    # Triton is not needed, nor always there, on a CPU
    from jitgraph.ops import attention, elementwise, linear, prefill_chunk, prefill_fused, sampling

    wanted = [name for name in names if flavour != "mixed" or name not in STATIC_OPS]
    for module in (elementwise, linear, attention, sampling):
        chosen |= _implementations(module, wanted, invariant)
    if not invariant:
        for module in (prefill_fused, prefill_chunk):
            chosen |= _implementations(module, wanted, invariant)
    if flavour == "jit-all" and not invariant:
        chosen |= {name: getattr(linear, f"kernels_{name}") for name in ("norm_linear", "linear_add", "norm_gated")}
    return Ops(flavour=flavour, invariant=invariant, **chosen)


def with_tuned_products(ops: Ops, tuned: TunedProducts) -> Ops:
    """The same ops, but with matrix products by the algorithms that were measured to be the fastest."""
    from jitgraph.ops.linear import Products

    products = Products(library=True, vector=True, tuned=tuned)
    names = ("norm_linear", "linear_add", "norm_gated")
    bound = {name: getattr(products, name) for name in names}
    return replace(ops, tuned_counts=tuned.classes(), **bound)


def _implementations(module: ModuleType, names: list[str], invariant: bool) -> dict[str, Op]:
    """What a module has of the named ops; its batch-invariant variant where one is wanted and there is one."""
    found = {name: getattr(module, name) for name in names if hasattr(module, name)}
    if invariant:
        found |= {name: getattr(module, f"invariant_{name}", op) for name, op in found.items()}
    return found


class KernelWorkspace(NamedTuple):
    """What the chosen ops need of the arena."""

    splits: int = 1
    """Most splits of the keys in decode attention."""
    scratch_words: int = 1
    """float32 words of sampling scratch per row."""
    score_words: int = 1
    """float32 words of scratch per row of ``score``."""
    split_sums: int = 1
    """float32 words for ops whose sum is split."""
    split_arrivals: int = 1
    """int32 words for the same."""


def kernel_workspace(
    ops: Ops, max_model_len: int, heads: tuple[int, int, int], vocab_size: int, outputs: int
) -> KernelWorkspace:
    """The workspace of the chosen ops for a context, a vocabulary, and products of up to ``outputs`` columns.

    ``heads``: query heads, KV heads, elements of each.
    """
    if ops.flavour == "torch":
        return KernelWorkspace()
    from jitgraph.ops import linear, prefill_fused
    from jitgraph.ops.attention import decode_splits
    from jitgraph.ops.sampling import score_words, scratch_words

    query_heads, kv_heads, dh = heads
    return KernelWorkspace(
        decode_splits(max_model_len, kv_heads),
        scratch_words(vocab_size),
        score_words(vocab_size),
        max(linear.partial_words(outputs), prefill_fused.partial_words(query_heads, dh)),
        max(linear.arrival_words(outputs), prefill_fused.arrival_words(query_heads)),
    )


def prompt_classes(ops: Ops, num_heads: int, chunk_tokens: int) -> tuple[int, ...]:
    """Token counts that stand for all up to ``chunk_tokens``: once each has run, no prompt is compiled for again.

    Triton compiles the integers 1, multiples of 16 and others apart, and wrappers choose kernels by the count.
    """
    if ops.flavour == "torch":
        return (1,)
    from jitgraph.ops.attention import prefill_classes
    from jitgraph.ops.linear import product_classes
    from jitgraph.ops.prefill_chunk import chunk_classes
    from jitgraph.ops.prefill_fused import fused_classes
    from jitgraph.ops.reference_prefill import JOINED_TOKENS

    wanted = {*prefill_classes(num_heads, chunk_tokens), *product_classes(chunk_tokens)}
    if ops.rope_prefill_attention is not None:
        wanted |= {*fused_classes(num_heads, min(chunk_tokens, JOINED_TOKENS))}
    if ops.chunk_attention is not None:
        wanted |= {*chunk_classes(num_heads, chunk_tokens)}
    wanted |= {count for count in ops.tuned_counts if count <= chunk_tokens}
    return tuple(sorted(wanted))
