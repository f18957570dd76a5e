"""What an engine is built from before ready: its ops, all its device memory besides the weights, and the step's program
bound to both."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from jitgraph.config import EngineConfig
from jitgraph.engine.sizing import Sizing
from jitgraph.graphs.buffers import Buffers, BufferSizes
from jitgraph.graphs.step import StepProgram
from jitgraph.model.cache import KVCache, PageAllocator
from jitgraph.model.decoder import Decoder
from jitgraph.model.hf import HfModel
from jitgraph.model.prefix import PrefixIndex
from jitgraph.model.rope import build_rope
from jitgraph.model.spec import ModelSpec
from jitgraph.model.weights import ModelWeights
from jitgraph.ops.reference_linear import ProductShape
from jitgraph.ops.select import Ops, kernel_workspace, select_ops, with_tuned_products
from jitgraph.ops.slots import SlotTable

Weights = ModelWeights | HfModel
"""What an engine runs: a native model's tensors, or a model of transformers."""


def settled(config: EngineConfig, weights: Weights) -> tuple[EngineConfig, tuple[str, ...]]:
    """The settings that hold for a model, and what its user must be told: one that is not native has not all of them.

    Raises:
        ConfigError: a setting that only native models have.
    """
    return weights.settle(config) if isinstance(weights, HfModel) else (config, ())


class Memory(NamedTuple):
    """What ``allocate`` made."""

    cache: KVCache
    pages: PageAllocator
    buffers: Buffers
    program: StepProgram


def allocate(config: EngineConfig, spec: ModelSpec, sizing: Sizing, ops: Ops, weights: Weights) -> Memory:
    """Cache, slot table and arena, and the program that works on them.

    Raises:
        CapacityError: the device has not that much memory; the message has both figures.
    """
    device, dtype = weights.embedding.device, weights.embedding.dtype
    cache = KVCache.allocate(spec, sizing.pages, config.page_size, dtype, device)
    slots = SlotTable.allocate(config.max_streams, sizing.pages_per_slot, device)
    outputs = max(spec.hidden_size, spec.qkv_size, spec.vocab_size)
    heads = (spec.num_heads, spec.num_kv_heads, spec.head_dim)
    kernels = kernel_workspace(ops, sizing.positions, heads, spec.vocab_size, outputs)
    buffers = Buffers(spec, BufferSizes(sizing.arena_tokens, config.max_streams, kernels), slots, dtype, device)
    if isinstance(weights, HfModel):
        program = StepProgram(weights.decoder(ops), buffers, cache)
    else:
        rope = build_rope(spec, sizing.positions, device)
        program = StepProgram(Decoder(spec, weights, rope, ops, sizing.window), buffers, cache)
    return Memory(cache, PageAllocator(sizing.pages, _prefixes(config, spec, sizing)), buffers, program)


def _prefixes(config: EngineConfig, spec: ModelSpec, sizing: Sizing) -> PrefixIndex | None:
    """What keeps pages for prompts that begin alike; None where it is switched off, and where a page's keys depend on
    more than the tokens up to it: on where a window stands, or on the length of the prompt."""
    if not config.prefix_cache or sizing.window is not None or spec.rope.kind == "dynamic":
        return None
    return PrefixIndex(config.page_size, outputs=not config.batch_invariant)


def choose_ops(
    config: EngineConfig, sizing: Sizing, weights: Weights, progress: Callable[[str, int, int], None]
) -> Ops:
    """The ops of a config. Where cuBLAS does the large products, its fastest algorithms are looked for first, which
    takes seconds unless the package has them for this device or an earlier start has left them in the disk cache.

    Raises:
        DeviceError: as ``select_ops``.
    """
    device = weights.embedding.device
    ops = select_ops(config.ops, device, config.batch_invariant)
    if device.type != "cuda" or ops.flavour != "jit" or ops.invariant or not config.tune_products:
        return ops
    if isinstance(weights, HfModel):
        return ops  # its products are its own
    # CUDA and Triton are not needed, nor always there, on a CPU
    from jitgraph.jit.disk_cache import open_cache
    from jitgraph.ops.linear import SKINNY_TOKENS
    from jitgraph.ops.products import tune_products

    with torch.inference_mode():
        tuned = tune_products(
            product_matrices(weights),
            SKINNY_TOKENS + 1,
            sizing.chunk_tokens,
            open_cache(),
            lambda done, total: progress("tune products", done, total),
        )
    return ops if tuned is None else with_tuned_products(ops, tuned)


def product_matrices(weights: ModelWeights) -> dict[ProductShape, list[torch.Tensor]]:
    """The layers' matrices by shape and use; those with a bias are left to torch."""
    found: dict[ProductShape, list[torch.Tensor]] = {}
    for layer in weights.layers:
        for matrix, bias, add in (
            (layer.qkv, layer.qkv_bias, False),
            (layer.o, layer.o_bias, True),
            (layer.gate_up, layer.gate_up_bias, False),
            (layer.down, layer.down_bias, True),
        ):
            if bias is None:
                n, k = matrix.shape
                found.setdefault(ProductShape(n, k, add), []).append(matrix)
    return found
