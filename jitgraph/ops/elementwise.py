"""Triton twins of the row-wise ops in ``reference.py``: step preparation, embedding, norms, SiLU, RoPE with KV append.

Signatures and meaning are the reference's. Each wrapper asserts what its kernel assumes and launches it on the current
stream: nothing is allocated, nothing synchronises, grids depend on shapes alone, so every call can be captured.
"""

from __future__ import annotations

import torch

from jitgraph.ops.elementwise_kernels import (
    add_rms_norm_kernel,
    embed_kernel,
    prepare_decode_kernel,
    prepare_prefill_kernel,
    receive_kernel,
    rms_norm_kernel,
    rope_append_kernel,
    silu_mul_kernel,
)
from jitgraph.ops.inbox import HEADER, InboxLayout
from jitgraph.ops.pdl import pdl_options, pdl_options_before
from jitgraph.ops.reference import Rolling, Rope, check_rolling, query_shape
from jitgraph.ops.slots import SlotTable

_STEP_BLOCK = 256
_COLUMN_BLOCK = 1024
_ROPE_TILE = 16, 4
"""Heads and warps of a RoPE program where there are many tokens."""


def next_power_of_two(n: int) -> int:
    """Smallest power of two that is at least n (n >= 1)."""
    return 1 << (n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def assert_contiguous(dtype: torch.dtype, *tensors: torch.Tensor) -> None:
    """What every kernel assumes of its operands: one dtype, row-major without gaps."""
    for tensor in tensors:
        assert tensor.dtype == dtype, f"expected {dtype}, got {tensor.dtype}"
        assert tensor.is_contiguous(), f"expected a contiguous tensor, got strides {tensor.stride()}"


def assert_slots(slots: SlotTable) -> None:
    """A slot table is int32 with unit column stride."""
    assert slots.words.dtype == torch.int32 and slots.words.stride(1) == 1


def assert_rolling(rolling: Rolling, tokens: int, capacity: int, dh: int) -> None:
    """What the kernels assume of a rolling window; ``capacity`` is the tokens of a slot's block table."""
    check_rolling(rolling, tokens, capacity)
    assert_contiguous(torch.int32, rolling.sample_position)
    assert_contiguous(torch.float32, rolling.cos_sin)
    assert dh % 2 == 0 and rolling.cos_sin.shape[1] == dh


def receive(
    inbox: torch.Tensor,
    launches: torch.Tensor,
    host_launch: int,
    layout: InboxLayout,
    prompt: bool,
    inputs: torch.Tensor,
    slots: SlotTable,
) -> None:
    """inputs = inbox[launches % depth], and launches += 1; see ``reference.receive``. ``host_launch`` is not needed."""
    del host_launch
    assert_contiguous(torch.int32, inbox, inputs)
    assert_contiguous(torch.int64, launches)
    assert_slots(slots)
    depth, width = inbox.shape
    assert width == layout.width and inputs.shape == (width,) and slots.stride == layout.slot_words
    receive_kernel[(1,)](
        inbox,
        launches,
        inputs,
        slots.words,
        DEPTH=depth,
        WIDTH=width,
        WORDS=width if prompt else HEADER,
        SLOT_WORDS=layout.slot_words,
        BLOCK=next_power_of_two(width if prompt else HEADER),
        num_warps=8 if prompt else 1,
    )


def prepare_prefill(
    header: torch.Tensor,
    prompt: torch.Tensor,
    dummy: int,
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    token_slot: torch.Tensor,
    sample_index: torch.Tensor,
    sample_slot: torch.Tensor,
    sample_position: torch.Tensor,
) -> None:
    """A chunk of one prompt to a step's tensors; see ``reference.prepare_prefill``."""
    outputs = (token_ids, positions, token_slot, sample_index, sample_slot, sample_position)
    assert_contiguous(torch.int32, header, prompt, *outputs)
    tokens = token_ids.shape[0]
    assert prompt.shape[0] >= tokens
    grid = (ceil_div(tokens, _STEP_BLOCK),)
    prepare_prefill_kernel[grid](
        header, prompt, *outputs, tokens, DUMMY=dummy, BLOCK=_STEP_BLOCK, num_warps=2, **pdl_options(tokens)
    )


def prepare_decode(
    row_slot: torch.Tensor,
    slots: SlotTable,
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    token_slot: torch.Tensor,
    sample_index: torch.Tensor,
    sample_slot: torch.Tensor,
    sample_position: torch.Tensor,
) -> None:
    """Slots to a step of one token per row; see ``reference.prepare_decode``."""
    outputs = (token_ids, positions, token_slot, sample_index, sample_slot, sample_position)
    assert_contiguous(torch.int32, row_slot, *outputs)
    assert_slots(slots)
    rows, block = row_slot.shape[0], 32
    prepare_decode_kernel[(ceil_div(rows, block),)](
        row_slot,
        slots.words,
        *outputs,
        rows,
        DUMMY=slots.dummy,
        SLOT_STRIDE=slots.stride,
        BLOCK=block,
        num_warps=1,
        **pdl_options(),
    )


def embed(token_ids: torch.Tensor, table: torch.Tensor, out: torch.Tensor) -> None:
    """out[t] = table[token_ids[t]]; see ``reference.embed``."""
    assert_contiguous(torch.int32, token_ids)
    assert_contiguous(table.dtype, table, out)
    rows, width = out.shape
    block = min(_COLUMN_BLOCK, next_power_of_two(width))
    embed_kernel[(rows, ceil_div(width, block))](
        token_ids, table, out, D=width, BLOCK=block, num_warps=4, **pdl_options(rows)
    )


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """out = x / sqrt(mean(x^2) + eps) * weight; see ``reference.rms_norm``."""
    assert_contiguous(x.dtype, x, weight, out)
    rows, width = x.shape
    block = next_power_of_two(width)
    rms_norm_kernel[(rows,)](
        x, weight, eps, out, D=width, BLOCK=block, num_warps=_row_warps(block), **pdl_options(rows)
    )


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """residual += x, then out = rms_norm(residual); see ``reference.add_rms_norm``."""
    assert_contiguous(x.dtype, x, residual, weight, out)
    rows, width = x.shape
    block = next_power_of_two(width)
    add_rms_norm_kernel[(rows,)](
        x, residual, weight, eps, out, D=width, BLOCK=block, num_warps=_row_warps(block), **pdl_options(rows)
    )


def _row_warps(block: int) -> int:
    """Warps for one row in one program: 8 elements, one 16-byte load of a half type, for each thread, within limits."""
    return max(1, min(16, block // 256))


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """out = silu(gate) * up; see ``reference.silu_mul``."""
    assert_contiguous(gate_up.dtype, gate_up, out)
    rows, width = out.shape
    assert gate_up.shape == (rows, 2 * width)
    # Twice the work for a program where smaller ones would not all be resident at once.
    block = min(_COLUMN_BLOCK * (2 if rows > 128 else 1), next_power_of_two(width))
    silu_mul_kernel[(rows, ceil_div(width, block))](
        gate_up, out, INTERMEDIATE=width, BLOCK=block, num_warps=4, **pdl_options(rows)
    )


def rope_append(
    qkv: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    positions: torch.Tensor,
    token_slot: torch.Tensor,
    slots: SlotTable,
    rope: Rope,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    q_out: torch.Tensor | None,
    rolling: Rolling | None = None,
) -> None:
    """Splits QKV, normalises and rotates q and k, appends k and v to the cache; see ``reference.rope_append``."""
    tokens, hq, dh = query_shape(qkv, k_cache, positions)
    assert q_out is None or q_out.shape == (tokens, hq, dh)
    page, hkv = k_cache.shape[1], k_cache.shape[2]
    assert_contiguous(qkv.dtype, qkv, k_cache, v_cache, *([] if q_out is None else [q_out]))
    assert_contiguous(torch.int32, positions, token_slot)
    assert_contiguous(torch.float32, rope.cos_sin)
    assert_slots(slots)
    assert qkv.numel() == tokens * (hq + 2 * hkv) * dh and dh % 2 == 0 and rope.cos_sin.shape[1] == dh
    assert (q_norm is None) == (k_norm is None)
    if q_norm is not None and k_norm is not None:
        assert_contiguous(qkv.dtype, q_norm, k_norm)
    if rolling is not None:
        assert q_out is not None, "a rolling window keeps its keys as they are"
        assert_rolling(rolling, tokens, slots.pages_per_slot * page, dh)
        assert rope.cos_sin is rolling.cos_sin and not rope.dynamic_original
    heads, warps = _ROPE_TILE if tokens > 16 else (4, 2)
    rope_append_kernel[(tokens, ceil_div(hq + 2 * hkv, heads))](
        qkv,
        qkv if q_norm is None else q_norm,  # never read without NORM
        qkv if k_norm is None else k_norm,
        eps,
        positions,
        token_slot,
        slots.words,
        rope.cos_sin,
        None if rolling is None else rolling.sample_position,
        rope.dynamic_base,
        rope.dynamic_factor,
        k_cache,
        v_cache,
        qkv if q_out is None else q_out,
        SLOT_STRIDE=slots.stride,
        HQ=hq,
        HKV=hkv,
        DH=dh,
        PAGE=page,
        NORM=q_norm is not None,
        DYNAMIC_ORIGINAL=rope.dynamic_original,
        SINKS=0 if rolling is None else rolling.sinks,
        RECENT=0 if rolling is None else rolling.recent,
        ROW_LAST=rolling is not None and rolling.sample_position.shape[0] > 1,
        IN_PLACE=q_out is None,
        BLOCK_H=heads,
        BLOCK_D=next_power_of_two(dh // 2),
        num_warps=warps,
        **pdl_options_before(tokens),
    )
