"""How much memory a model will take under given settings, and whether it is there: known before anything is loaded.

Pure arithmetic over figures that the engine itself uses to allocate, and one question to the device.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from jitgraph.config import EngineConfig, parse_size
from jitgraph.engine.sizing import Sizing, resolve_sizing
from jitgraph.errors import CapacityError, CheckpointError
from jitgraph.graphs.buffers import BufferSizes, declare
from jitgraph.model.hf_spec import ForeignSpec
from jitgraph.model.packing import hf_shapes
from jitgraph.model.spec import ModelSpec
from jitgraph.ops.inbox import InboxLayout
from jitgraph.ops.select import KernelWorkspace
from jitgraph.ops.slots import BLOCK_TABLE
from jitgraph.text.tokenizer import Tokenizer

LIBRARIES_BYTES = 256 << 20
"""What CUDA's libraries and the pool of graphs take on a GPU besides, for models of all sizes."""
GIB = 2**30


@dataclass(frozen=True)
class Need:
    """Bytes that an engine takes."""

    weights: int
    kv: int
    workspace: int
    """Arena, graphs, and what libraries take."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.kv + self.workspace


def parameter_count(spec: ModelSpec) -> int:
    """Elements of all distinct tensors."""
    if isinstance(spec, ForeignSpec):
        return spec.parameters
    return sum(math.prod(shape) for shape in hf_shapes(spec).values())


def needed(spec: ModelSpec, config: EngineConfig, element_bytes: int, cuda: bool) -> Need:
    """What an engine of these settings takes, in tensors of ``element_bytes`` each.

    Raises:
        ConfigError, CapacityError: as ``resolve_sizing``.
    """
    sizing = resolve_sizing(config, spec, element_bytes)
    graphs = parse_size(config.graph_memory, "graph_memory") if cuda and config.graphs else 0
    workspace = _arena_bytes(spec, config, sizing, element_bytes) + graphs + (LIBRARIES_BYTES if cuda else 0)
    return Need(parameter_count(spec) * element_bytes, sizing.pages * sizing.page_bytes, workspace)


def _arena_bytes(spec: ModelSpec, config: EngineConfig, sizing: Sizing, element_bytes: int) -> int:
    """Of the buffers that a step touches. What kernels add is small beside ``LIBRARIES_BYTES``."""
    if isinstance(spec, ForeignSpec):
        spec = dataclasses.replace(spec, hidden_size=1, intermediate_size=1)
    layout = InboxLayout((BLOCK_TABLE + sizing.pages_per_slot + 3) // 4 * 4, sizing.arena_tokens)
    dtype = torch.float32 if element_bytes == 4 else torch.float16
    sizes = BufferSizes(sizing.arena_tokens, config.max_streams, KernelWorkspace())
    return sum(one.nbytes for one in declare(spec, sizes, layout, config.max_streams + 1, dtype))


def free_bytes(device: torch.device) -> int | None:
    """What the device can still give to this process; None where the machine does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free) + int(kept)
    meminfo = Path("/proc/meminfo")
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE) if meminfo.exists() else None
    return None if found is None else int(found.group(1)) * 1024


def check_fit(
    name: str, spec: ModelSpec, config: EngineConfig, element_bytes: int, device: torch.device, free: int | None
) -> None:
    """Refuses a model that ``free`` bytes cannot hold; None asks nothing.

    Raises:
        CapacityError: it does not fit; the message has the figures, and a setting with which it would.
    """
    cuda = device.type == "cuda"
    need = needed(spec, config, element_bytes, cuda)
    if free is None or need.total <= free:
        return
    raise CapacityError(
        f"{name} does not fit on {device}: it needs {need.total / GIB:.2f} GiB (weights {need.weights / GIB:.2f}, "
        f"KV cache {need.kv / GIB:.2f}, workspace {need.workspace / GIB:.2f}) and {free / GIB:.2f} GiB are free; "
        + _remedy(spec, config, element_bytes, cuda, free, need)
    )


def _remedy(spec: ModelSpec, config: EngineConfig, element_bytes: int, cuda: bool, free: int, need: Need) -> str:
    """A setting that would fit, by its figure."""
    room = free - need.weights - need.workspace
    if config.kv_window is not None or config.kv_cache_memory is not None:
        if room >= need.kv // 8:
            return f"kv_cache_memory of {room >> 20} MiB would fit"
    else:
        context = resolve_sizing(config, spec, element_bytes).max_model_len
        for streams in dict.fromkeys((config.max_streams, 1)):
            length = _longest(
                spec, dataclasses.replace(config, max_streams=streams), element_bytes, cuda, free, context
            )
            if length is not None:
                beside = "" if streams == config.max_streams else f" with max_streams={streams}"
                return f"max_model_len={length}{beside} would fit"
    return f"use a device with {need.total / GIB:.2f} GiB free, or a smaller model or dtype"


def _longest(
    spec: ModelSpec, config: EngineConfig, element_bytes: int, cuda: bool, free: int, context: int
) -> int | None:
    """The longest context that fits, in steps of 64 tokens and of at least 128; None where there is none."""

    def fits(length: int) -> bool:
        return needed(spec, dataclasses.replace(config, max_model_len=length), element_bytes, cuda).total <= free

    lengths = range(128, context + 1, 64)
    if not lengths or not fits(lengths[0]):
        return None
    low, high = 0, len(lengths)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(lengths[middle]) else (low, middle)
    return lengths[low]


def check_tokenizer(name: str, tokenizer: Tokenizer | None, spec: ModelSpec) -> None:
    """Refuses a tokenizer whose vocabulary the model does not have. Entries that were added to a tokenizer alone are
    common and harmless: a prompt that has them is refused by itself.

    Raises:
        CheckpointError: it gives ids that the embedding has no row for.
    """
    if tokenizer is not None and tokenizer.base_vocab_size > spec.vocab_size:
        raise CheckpointError(
            f"{name}: the tokenizer does not match the model, it has {tokenizer.base_vocab_size} entries and the "
            f"embedding {spec.vocab_size} rows: use the tokenizer.json that belongs to these weights"
        )
