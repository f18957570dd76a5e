"""Compiles every op's kernels for one architecture, in each dtype: ``python kernel_cases.py 90``.

A script of its own because ``triton.jit`` decides at import whether to interpret. Prints one JSON object; of each dtype
it has the ops run with the kernels each one compiled, the names of all kernels there are, and the figures of every
binary. A kernel that sees no number of the model's dtype is compiled once for all. Tensors are on ``meta``: only their
dtype, shape and alignment count.

What a build of an engine compiles is more than this: every family's shapes, in every class of token counts. Compiling
takes a minute of a core for each hundred of these, so here are those that differ in more than figures: each kernel in
each dtype, and once each tile, class of token count, head size, window, norm, bias and vocabulary's padding. The half
types share these, since their kernels differ in the type alone; the largest tile, which spills first, has full-size
heads in each.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from jitgraph import ops
from jitgraph.jit.binary import Binary
from jitgraph.jit.compile_only import CompileReport, compile_only
from jitgraph.jit.kernel import Kernel
from jitgraph.ops import attention, elementwise, linear, prefill_chunk, prefill_fused, sampling
from jitgraph.ops.inbox import InboxLayout
from jitgraph.ops.reference import Rolling, Rope
from jitgraph.ops.reference_linear import SplitScratch
from jitgraph.ops.ring import RING_FIELDS
from jitgraph.ops.select import op_names
from jitgraph.ops.slots import BLOCK_TABLE, SlotTable, mask_words
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
    chunks: Mapping[str, tuple[int, ...]]
    """The lengths of prompt chunks to compile for, of each dtype that has this layout."""
    sampled: tuple[str, ...] = ()
    """The dtypes that compile this vocabulary's sampling, which depends on nothing else and is slow to compile."""
    qk_norm: bool = False
    window: int = 0
    dynamic: bool = False
    rolling: bool = False
    """The rolling KV window, of all the context."""


HALF, BRAIN, SINGLE = "float16", "bfloat16", "float32"
LLAMA = "llama-2-7b", 4096, 11008, 32, 32, 128, 32000
MISTRAL = "mistral-7b", 4096, 14336, 32, 8, 128, 32000
QWEN2 = "qwen2.5-0.5b", 896, 4864, 14, 2, 64, 151936
QWEN3 = "qwen3-0.6b", 1024, 3072, 16, 8, 128, 151936

LAYOUTS = (
    Layout(*LLAMA, {HALF: (1, 512), BRAIN: (200, 512), SINGLE: (10,)}, sampled=(HALF, SINGLE)),
    Layout(*LLAMA, {HALF: (512,)}, dynamic=True),
    Layout(*MISTRAL, {HALF: (512,), BRAIN: (10,)}, window=4096),
    Layout(*QWEN2, {HALF: (512,), SINGLE: (200,)}),
    Layout(*QWEN3, {BRAIN: (200,), SINGLE: (512,)}, sampled=(BRAIN,), qk_norm=True),
    Layout(*LLAMA, {HALF: (512,), BRAIN: (10,), SINGLE: (200,)}, rolling=True),
    Layout(*QWEN3, {HALF: (10, 512)}, qk_norm=True, rolling=True),
)
FULL_SIZE = LAYOUTS[0]
SMALL = Layout("small and odd", 72, 104, 3, 1, 24, 203, {})
"""Neither multiples of the tiles nor powers of two."""
PRODUCTS = {HALF: (FULL_SIZE, (64, 200)), BRAIN: (SMALL, (64, 200)), SINGLE: (SMALL, (200,))}
"""The products of each dtype: of which layout, and for which token counts the tiles of the batch-invariant mode."""


class Cases:
    """Runs ops under ``compile_only`` and notes which kernels each one compiled."""

    def __init__(self, report: CompileReport, dtype: torch.dtype) -> None:
        self.report = report
        self.dtype = dtype
        self.ops: dict[str, set[str]] = {}
        self.binaries: dict[int, Binary] = {}
        """What was launched in this dtype, each binary once."""

    def half(self, *shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=self.dtype, device="meta")

    @staticmethod
    def ints(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.int32, device="meta")

    @staticmethod
    def floats(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.float32, device="meta")

    def run(self, op: Callable[..., Any], *args: Any) -> None:
        """Launches an op, and notes its kernels under its name."""
        self.ops.setdefault(op.__name__, set()).update(self.launch(op, *args))

    def launch(self, op: Callable[..., Any], *args: Any) -> set[str]:
        """Compiles what a call launches; the names of its kernels."""
        launched: set[str] = set()
        add = self.report.add

        def noting(*call: Any) -> Any:
            binary = add(*call)
            launched.add(binary.kernel)
            self.binaries[id(binary)] = binary
            return binary

        self.report.add = noting  # type: ignore[method-assign]
        try:
            op(*args)
        finally:
            self.report.add = add  # type: ignore[method-assign]
        return launched


def compile_layout(cases: Cases, layout: Layout, token_counts: tuple[int, ...], sampling: bool) -> None:
    """All ops of a layout, for batches of each class of integers that Triton tells apart (1, others)."""
    pages = CONTEXT // PAGE
    slots = SlotTable(cases.ints(STREAMS + 1, (BLOCK_TABLE + pages + 3) // 4 * 4), pages)
    compile_receive(cases, slots, token_counts[-1])
    for tokens in token_counts:
        inputs = [cases.ints(tokens) for _ in range(3)]
        where = [cases.ints(1) for _ in range(3)]
        cases.run(elementwise.prepare_prefill, cases.ints(4), cases.ints(512), slots.dummy, *inputs, *where)
        compile_layers(cases, layout, tokens)
        compile_attention(cases, layout, slots, tokens)
    for rows in (1, 3):
        cases.run(elementwise.prepare_decode, cases.ints(rows), slots, *(cases.ints(rows) for _ in range(6)))
        compile_decode(cases, layout, slots, rows)
    for rows in (1, 3) if sampling else ():
        compile_sampling(cases, layout, slots, rows)
        compile_note_prompt(cases, layout, slots, rows)


def compile_receive(cases: Cases, slots: SlotTable, chunk: int) -> None:
    """The inputs of a chunk's step and of a decode step."""
    layout = InboxLayout(slots.stride, chunk)
    launches = torch.empty(1, dtype=torch.int64, device="meta")
    for prompt in (False, True):
        inputs = cases.ints(layout.width)
        cases.run(elementwise.receive, cases.ints(32, layout.width), launches, 0, layout, prompt, inputs, slots)


def compile_layers(cases: Cases, layout: Layout, tokens: int) -> None:
    """Embedding, and what stands beside the products of a library: norms and activation."""
    hidden = layout.hidden
    x, residual, out, weight = (cases.half(tokens, hidden) for _ in range(4))
    cases.run(elementwise.embed, cases.ints(tokens), cases.half(layout.vocabulary, hidden), out)
    cases.launch(elementwise.rms_norm, x, weight[0], 1e-5, out)
    cases.launch(elementwise.add_rms_norm, x, residual, weight[0], 1e-5, out)
    gate_up = cases.half(tokens, 2 * layout.intermediate)
    cases.launch(elementwise.silu_mul, gate_up, cases.half(tokens, layout.intermediate))


STANDARD = linear.Products(library=True, vector=True)
INVARIANT = linear.Products(library=False, vector=False)


def compile_products(cases: Cases, layout: Layout, invariant: tuple[int, ...]) -> None:
    """Every product of a model for one token and for few, and the tiles of the batch-invariant mode."""
    for tokens in (1, 10):
        compile_norm_linear(cases, layout, tokens)
        compile_mlp(cases, STANDARD, layout, tokens)
    for tokens in (10, *invariant):
        compile_mlp(cases, INVARIANT, layout, tokens)


def compile_mlp(cases: Cases, product: linear.Products, layout: Layout, tokens: int) -> None:
    """Gate and up together, then down."""
    hidden, intermediate = layout.hidden, layout.intermediate
    residual, normed, norm = cases.half(tokens, hidden), cases.half(tokens, hidden), cases.half(hidden)
    gate_up, activated = cases.half(tokens, 2 * intermediate), cases.half(tokens, intermediate)
    up, down = cases.half(2 * intermediate, hidden), cases.half(hidden, intermediate)
    scratch = product_scratch(cases, hidden)
    cases.run(product.norm_gated, None, residual, norm, 1e-5, up, None, normed, gate_up, activated, scratch)
    cases.run(product.linear_add, activated, down, None, normed, residual, scratch)


def compile_norm_linear(cases: Cases, layout: Layout, tokens: int) -> None:
    """Q, K and V together, with and without a bias, and the LM head."""
    hidden, heads = layout.hidden, layout.heads + 2 * layout.kv_heads
    residual, normed, norm = cases.half(tokens, hidden), cases.half(tokens, hidden), cases.half(hidden)
    qkv = heads * layout.head_dim
    for outputs, bias in ((qkv, None), (qkv, cases.half(qkv)), (layout.vocabulary, None)):
        weight, out = cases.half(outputs, hidden), cases.half(tokens, outputs)
        where = (normed, out, product_scratch(cases, outputs))
        cases.run(STANDARD.norm_linear, None, residual, norm, 1e-5, weight, bias, *where)


def product_scratch(cases: Cases, outputs: int) -> SplitScratch:
    return SplitScratch(cases.floats(linear.partial_words(outputs)), cases.ints(linear.arrival_words(outputs)))


def compile_attention(cases: Cases, layout: Layout, slots: SlotTable, tokens: int) -> None:
    q = cases.half(tokens, layout.heads, layout.head_dim)
    cache = cases.half(64, PAGE, layout.kv_heads, layout.head_dim)
    qkv = cases.half(tokens, (layout.heads + 2 * layout.kv_heads) * layout.head_dim)
    norm = cases.half(layout.head_dim) if layout.qk_norm else None
    positions, token_slot = cases.ints(tokens), cases.ints(tokens)
    dynamic = {"dynamic_original": CONTEXT, "dynamic_base": 1e4, "dynamic_factor": 2.0} if layout.dynamic else {}
    rope = Rope(cases.floats(CONTEXT, layout.head_dim), **dynamic)
    to = (slots, rope, cache, cache, q)
    scale = layout.head_dim**-0.5
    of_chunk = rolling_window(cases, layout, rope, 1)
    cases.run(elementwise.rope_append, qkv, norm, norm, 1e-6, positions, token_slot, *to, of_chunk)
    if layout.rolling:  # rows of a batch have a window each
        of_rows = rolling_window(cases, layout, rope, tokens)
        cases.run(elementwise.rope_append, qkv, norm, norm, 1e-6, positions, token_slot, *to, of_rows)
    if not layout.rolling:
        to_itself = (slots, rope, cache, cache, None)
        cases.run(elementwise.rope_append, qkv, norm, norm, 1e-6, positions, token_slot, *to_itself)
    if layout.qk_norm:  # attention itself does not know of the norms: the other layouts have it
        return
    where = (positions, token_slot, slots, scale, layout.window)
    cases.run(attention.prefill_attention, q, cache, cache, *where, q, of_chunk)
    if not layout.rolling:
        cases.run(prefill_chunk.chunk_attention, qkv, cache, cache, *where, q)
    if not (layout.dynamic or layout.rolling):
        chunk = (qkv, positions, token_slot, slots, rope, cache, cache, scale, layout.window, q)
        words = prefill_fused.partial_words(layout.heads, layout.head_dim)
        arrivals = prefill_fused.arrival_words(layout.heads)
        scratch = SplitScratch(cases.floats(words), cases.ints(arrivals))
        cases.run(prefill_fused.rope_prefill_attention, *chunk, scratch)


def rolling_window(cases: Cases, layout: Layout, rope: Rope, rows: int) -> Rolling | None:
    return Rolling(4, CONTEXT - 4, cases.ints(rows), rope.cos_sin) if layout.rolling else None


def compile_decode(cases: Cases, layout: Layout, slots: SlotTable, rows: int) -> None:
    q = cases.half(rows, layout.heads, layout.head_dim)
    cache = cases.half(64, PAGE, layout.kv_heads, layout.head_dim)
    splits = attention.decode_splits(CONTEXT, layout.kv_heads)
    partial = cases.floats(rows, layout.heads, splits, layout.head_dim)
    scale, where = layout.head_dim**-0.5, (cases.ints(rows), cases.ints(rows), slots)
    lse = cases.floats(rows, layout.heads, splits)
    arrivals = cases.ints(rows, layout.kv_heads)
    rolling = rolling_window(cases, layout, Rope(cases.floats(CONTEXT, layout.head_dim)), rows)
    work = (partial, lse, arrivals, q, rolling)
    cases.run(attention.decode_attention, q, cache, cache, *where, scale, layout.window, *work)


def compile_sampling(cases: Cases, layout: Layout, slots: SlotTable, rows: int) -> None:
    logits = cases.half(rows, layout.vocabulary)
    where, tokens = (cases.ints(rows), cases.ints(rows)), cases.ints(rows)
    scratch = cases.floats(STREAMS, sampling.scratch_words(layout.vocabulary))
    top = (cases.floats(rows), cases.ints(rows, MAX_LOGPROBS), cases.floats(rows, MAX_LOGPROBS))
    cases.run(sampling.greedy, logits, *where, slots, scratch, tokens)
    history = cases.ints(STREAMS + 1, layout.vocabulary)
    masks = cases.ints(STREAMS + 1, mask_words(layout.vocabulary))
    cases.run(sampling.sample, logits, *where, slots, history, masks, scratch, tokens, *top)
    words = cases.floats(rows, sampling.score_words(layout.vocabulary))
    cases.run(sampling.score, logits, tokens, words, *top)
    counter = torch.empty(1, dtype=torch.int64, device="meta")
    ring = torch.empty(64, STREAMS, RING_FIELDS, dtype=torch.int64, device="meta")
    for reported in ((None, None, None, slots, None), (*top, slots, history)):
        cases.run(sampling.advance, *where, tokens, *reported, counter, ring, 0)


def compile_note_prompt(cases: Cases, layout: Layout, slots: SlotTable, tokens: int) -> None:
    inputs = [cases.ints(tokens) for _ in range(3)]
    cases.run(sampling.note_prompt, *inputs, slots, cases.ints(STREAMS + 1, layout.vocabulary))


def all_kernels() -> list[str]:
    """Qualified names of the kernels of ``jitgraph.ops``, in whatever module they stand."""
    modules = [importlib.import_module(f"jitgraph.ops.{info.name}") for info in pkgutil.iter_modules(ops.__path__)]
    found = [value.jit_function for module in modules for value in vars(module).values() if isinstance(value, Kernel)]
    return sorted({f"{function.__module__}.{function.__qualname__}" for function in found})


def compile_dtype(report: CompileReport, dtype: str) -> dict[str, Any]:
    """What the object that is printed has of a dtype."""
    cases = Cases(report, getattr(torch, dtype))
    for layout in LAYOUTS:
        if dtype in layout.chunks:
            compile_layout(cases, layout, layout.chunks[dtype], dtype in layout.sampled)
    compile_products(cases, *PRODUCTS[dtype])
    figures = ("kernel", "signature", "registers", "local_bytes", "shared_bytes", "ms")
    return {
        "wanted_ops": sorted(op_names()),
        "wanted_kernels": all_kernels(),
        "ops": {op: sorted(launched) for op, launched in cases.ops.items()},
        "binaries": [{name: getattr(binary, name) for name in figures} for binary in cases.binaries.values()],
    }


def main(arch: int) -> None:
    with compile_only(arch) as report:
        json.dump({dtype: compile_dtype(report, dtype) for dtype in PRODUCTS}, sys.stdout)


if __name__ == "__main__":
    main(int(sys.argv[1]))
