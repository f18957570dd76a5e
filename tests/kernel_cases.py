"""Compiles every op's kernels for one architecture and dtype: ``python kernel_cases.py 90 float16``.

A script of its own because ``triton.jit`` decides at import whether to interpret. Prints one JSON object: the ops run
with the kernels each one compiled, the names of all kernels there are, and the figures of every binary. Tensors are on
``meta``: only their dtype, shape and alignment count.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch

from jitgraph import ops
from jitgraph.jit.compile_only import CompileReport, compile_only
from jitgraph.jit.kernel import Kernel
from jitgraph.ops import attention, elementwise, sampling
from jitgraph.ops.reference import Rope
from jitgraph.ops.ring import RING_FIELDS
from jitgraph.ops.select import Ops
from jitgraph.ops.slots import BLOCK_TABLE, SlotTable
from jitgraph.types import MAX_LOGPROBS

PAGE, STREAMS, CONTEXT = 16, 8, 4096


@dataclass(frozen=True)
class Layout:
    """The geometry that a model's kernels are compiled for."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    qk_norm: bool = False
    window: int = 0
    dynamic: bool = False
    float32: bool = True
    """Compiled in float32 too: full precision products are slow to compile, and layouts differ little."""


LAYOUTS = (
    Layout("llama-2-7b", 4096, 11008, 32, 32, 128, 32000),
    Layout("llama-2-7b, dynamic rope", 4096, 11008, 32, 32, 128, 32000, dynamic=True),
    Layout("llama-3.1-8b", 4096, 14336, 32, 8, 128, 128256, float32=False),
    Layout("mistral-7b, window", 4096, 14336, 32, 8, 128, 32000, window=4096),
    Layout("qwen2.5-0.5b", 896, 4864, 14, 2, 64, 151936),
    Layout("qwen3-0.6b", 1024, 3072, 16, 8, 128, 151936, qk_norm=True),
)


class Cases:
    """Runs ops under ``compile_only`` and notes which kernels each one compiled."""

    def __init__(self, report: CompileReport, dtype: torch.dtype) -> None:
        self.report = report
        self.dtype = dtype
        self.ops: dict[str, set[str]] = {}

    def half(self, *shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=self.dtype, device="meta")

    @staticmethod
    def ints(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.int32, device="meta")

    @staticmethod
    def floats(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.float32, device="meta")

    def run(self, op: Callable[..., None], *args: Any) -> None:
        launched: set[str] = set()
        add = self.report.add

        def noting(*call: Any) -> Any:
            binary = add(*call)
            launched.add(binary.kernel)
            return binary

        self.report.add = noting  # type: ignore[method-assign]
        try:
            op(*args)
        finally:
            self.report.add = add  # type: ignore[method-assign]
        self.ops.setdefault(op.__name__, set()).update(launched)


def compile_layout(cases: Cases, layout: Layout, token_counts: tuple[int, ...], sampling_rows: tuple[int, ...]) -> None:
    """All ops of a layout, for integers of each class that Triton tells apart (1, a multiple of 16, others)."""
    pages = CONTEXT // PAGE
    slots = SlotTable(cases.ints(STREAMS + 1, (BLOCK_TABLE + pages + 3) // 4 * 4), pages)
    for tokens in token_counts:
        inputs = [cases.ints(tokens) for _ in range(3)]
        where = [cases.ints(1) for _ in range(3)]
        cases.run(elementwise.prepare_prefill, cases.ints(4), cases.ints(512), slots.dummy, *inputs, *where)
        compile_layers(cases, layout, tokens)
        compile_attention(cases, layout, slots, tokens)
    for rows in (1, 3):
        cases.run(elementwise.prepare_decode, cases.ints(rows), slots, *(cases.ints(rows) for _ in range(6)))
        compile_decode(cases, layout, slots, rows)
    for rows in sampling_rows:
        compile_sampling(cases, layout, slots, rows)


def compile_layers(cases: Cases, layout: Layout, tokens: int) -> None:
    hidden = layout.hidden
    x, residual, out, weight = (cases.half(tokens, hidden) for _ in range(4))
    cases.run(elementwise.embed, cases.ints(tokens), cases.half(layout.vocabulary, hidden), out)
    cases.run(elementwise.rms_norm, x, weight[0], 1e-5, out)
    cases.run(elementwise.add_rms_norm, x, residual, weight[0], 1e-5, out)
    gate_up = cases.half(tokens, 2 * layout.intermediate)
    cases.run(elementwise.silu_mul, gate_up, cases.half(tokens, layout.intermediate))


def compile_attention(cases: Cases, layout: Layout, slots: SlotTable, tokens: int) -> None:
    q = cases.half(tokens, layout.heads, layout.head_dim)
    cache = cases.half(64, PAGE, layout.kv_heads, layout.head_dim)
    qkv = cases.half(tokens, (layout.heads + 2 * layout.kv_heads) * layout.head_dim)
    norm = cases.half(layout.head_dim) if layout.qk_norm else None
    positions, token_slot = cases.ints(tokens), cases.ints(tokens)
    dynamic = {"dynamic_original": CONTEXT, "dynamic_base": 1e4, "dynamic_factor": 2.0} if layout.dynamic else {}
    rope = Rope(cases.floats(CONTEXT, layout.head_dim), **dynamic)
    cases.run(elementwise.rope_append, qkv, norm, norm, 1e-6, positions, token_slot, slots, rope, cache, cache, q)
    scale = layout.head_dim**-0.5
    cases.run(attention.prefill_attention, q, cache, cache, positions, token_slot, slots, scale, layout.window, q)


def compile_decode(cases: Cases, layout: Layout, slots: SlotTable, rows: int) -> None:
    q = cases.half(rows, layout.heads, layout.head_dim)
    cache = cases.half(64, PAGE, layout.kv_heads, layout.head_dim)
    splits = attention.decode_splits(CONTEXT, layout.kv_heads)
    partial = cases.floats(rows, layout.heads, splits, layout.head_dim)
    scale, where = layout.head_dim**-0.5, (cases.ints(rows), cases.ints(rows), slots)
    lse = cases.floats(rows, layout.heads, splits)
    cases.run(attention.decode_attention, q, cache, cache, *where, scale, layout.window, partial, lse, q)


def compile_sampling(cases: Cases, layout: Layout, slots: SlotTable, rows: int) -> None:
    logits = cases.half(rows, layout.vocabulary)
    where, tokens = (cases.ints(rows), cases.ints(rows)), cases.ints(rows)
    scratch = cases.floats(STREAMS, sampling.scratch_words(layout.vocabulary))
    top = (cases.floats(rows), cases.ints(rows, MAX_LOGPROBS), cases.floats(rows, MAX_LOGPROBS))
    cases.run(sampling.greedy, logits, *where, slots, scratch, tokens)
    cases.run(sampling.sample, logits, *where, slots, scratch, tokens, *top)
    counter = torch.empty(1, dtype=torch.int64, device="meta")
    ring = torch.empty(64, STREAMS, RING_FIELDS, dtype=torch.int64, device="meta")
    for reported in ((None, None, None), top):
        cases.run(sampling.advance, *where, tokens, *reported, slots, counter, ring, 0)


def all_kernels() -> list[str]:
    """Qualified names of the kernels of ``jitgraph.ops``, in whatever module they stand."""
    modules = [importlib.import_module(f"jitgraph.ops.{info.name}") for info in pkgutil.iter_modules(ops.__path__)]
    found = [value.jit_function for module in modules for value in vars(module).values() if isinstance(value, Kernel)]
    return sorted({f"{function.__module__}.{function.__qualname__}" for function in found})


def main(arch: int, dtype: str) -> None:
    with compile_only(arch) as report:
        cases = Cases(report, getattr(torch, dtype))
        vocabularies: set[int] = set()
        for layout in LAYOUTS:
            if dtype == "float32" and not layout.float32:
                continue
            # Sampling depends on the vocabulary alone, and it is slow to compile: half precision once each.
            new = layout.vocabulary not in vocabularies and (dtype == "float16" or not vocabularies)
            vocabularies.add(layout.vocabulary)
            compile_layout(cases, layout, (1, 10, 512) if layout is LAYOUTS[0] else (10, 512), (1, 3) if new else ())
    figures = ("kernel", "signature", "registers", "local_bytes", "shared_bytes", "ms")
    result = {
        "wanted_ops": sorted({field.name for field in fields(Ops)} - {"flavour", "linear"}),
        "wanted_kernels": all_kernels(),
        "ops": {op: sorted(launched) for op, launched in cases.ops.items()},
        "binaries": [{name: getattr(binary, name) for name in figures} for binary in report.binaries],
    }
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
