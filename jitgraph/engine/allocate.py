"""All the device memory of an engine besides the weights, and the step's program bound to it. Before ready, once."""

from __future__ import annotations

from typing import NamedTuple

from jitgraph.config import EngineConfig
from jitgraph.engine.sizing import Sizing
from jitgraph.graphs.buffers import Buffers, BufferSizes
from jitgraph.graphs.step import StepProgram
from jitgraph.model.cache import KVCache, PageAllocator
from jitgraph.model.decoder import Decoder
from jitgraph.model.rope import build_rope
from jitgraph.model.spec import ModelSpec
from jitgraph.model.weights import ModelWeights
from jitgraph.ops.select import Ops, kernel_workspace
from jitgraph.ops.slots import SlotTable


class Memory(NamedTuple):
    """What ``allocate`` made."""

    cache: KVCache
    pages: PageAllocator
    buffers: Buffers
    program: StepProgram


def allocate(config: EngineConfig, spec: ModelSpec, sizing: Sizing, ops: Ops, weights: ModelWeights) -> Memory:
    """Cache, slot table and arena, and the program that works on them.

    Raises:
        CapacityError: the device has not that much memory; the message has both figures.
    """
    device, dtype = weights.embedding.device, weights.embedding.dtype
    rope = build_rope(spec, sizing.positions, device)
    cache = KVCache.allocate(spec, sizing.pages, config.page_size, dtype, device)
    slots = SlotTable.allocate(config.max_streams, sizing.pages_per_slot, device)
    outputs = max(spec.hidden_size, spec.qkv_size, spec.vocab_size)
    kernels = kernel_workspace(ops, sizing.positions, spec.num_kv_heads, spec.vocab_size, outputs)
    buffers = Buffers(spec, BufferSizes(sizing.arena_tokens, config.max_streams, kernels), slots, dtype, device)
    program = StepProgram(Decoder(spec, weights, rope, ops, sizing.window), buffers, cache)
    return Memory(cache, PageAllocator(sizing.pages), buffers, program)
