"""Every buffer a step touches, declared once with its shape, dtype and what may be assumed of its padding.

Owned by the engine's thread and stream. Allocated before the first step; a replay takes no arguments and no step
allocates. Smaller steps use leading views of the buffers of the largest one, so all graphs share one workspace.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch

from jitgraph.graphs.key import GraphKey
from jitgraph.model.batch import Batch, Workspace
from jitgraph.model.spec import ModelSpec
from jitgraph.ops.inbox import EMIT, MAX_ROWS, ROWS, SLOT, InboxLayout
from jitgraph.ops.ring import RING_FIELDS
from jitgraph.ops.select import KernelWorkspace
from jitgraph.ops.slots import SlotTable, mask_words
from jitgraph.types import MAX_LOGPROBS

RING_DEPTH = 256
"""Steps whose records the token ring holds: two device-side loops and what comes before and after them."""
INBOX_DEPTH = 32
"""Launches whose inputs the inbox holds. A row may be read until its launch has run, and few are ever in flight."""


SCORE_ROWS = 64
"""Rows whose logits are kept at a time while a prompt is scored: 16 MiB of half precision for 131,072 entries."""


class Padding(enum.Enum):
    """What a step may assume of the elements beyond its real tokens, and who makes it so."""

    PREPARED = "the prepare op writes every element of every step, padding as the dummy slot's"
    WRITTEN = "each element is written before it is read within one step, so stale content is harmless"
    HOST = "the step's first op writes it from the inbox; elements past the header's count are never read"
    STATE = "kept from step to step; padding belongs to the dummy slot"


@dataclass(frozen=True)
class Declared:
    """One buffer."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    padding: Padding

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


@dataclass(frozen=True)
class BufferSizes:
    """The largest step."""

    tokens: int
    """T: the largest bucket, or the largest batch where that is more."""
    rows: int
    """R: the largest batch."""
    kernels: KernelWorkspace
    """What the chosen kernels need."""


def declare(spec: ModelSpec, sizes: BufferSizes, layout: InboxLayout, slots: int, dtype: torch.dtype) -> list[Declared]:
    """The buffers on the device, in the order in which they are laid out; ``slots`` counts the dummy."""
    t, r, kernels = sizes.tokens, sizes.rows, sizes.kernels
    i32, f32 = torch.int32, torch.float32
    prepared = [(name, (t,)) for name in ("token_ids", "positions", "token_slot")]
    prepared += [(name, (r,)) for name in ("sample_index", "sample_slot", "sample_position")]
    work: list[tuple[str, tuple[int, ...], torch.dtype]] = [
        ("hidden", (t, spec.hidden_size), dtype),
        ("residual", (t, spec.hidden_size), dtype),
        ("normed", (t, spec.hidden_size), dtype),
        ("qkv", (t, spec.qkv_size), dtype),
        ("q", (t, spec.num_heads, spec.head_dim), dtype),
        ("attended", (t, spec.num_heads, spec.head_dim), dtype),
        ("gate_up", (t, 2 * spec.intermediate_size), dtype),
        ("activated", (t, spec.intermediate_size), dtype),
        ("partial", (r, spec.num_heads, kernels.splits, spec.head_dim), f32),
        ("partial_lse", (r, spec.num_heads, kernels.splits), f32),
        ("split_sums", (kernels.split_sums,), f32),
        ("last_hidden", (r, spec.hidden_size), dtype),
        ("last_normed", (r, spec.hidden_size), dtype),
        ("logits", (r, spec.vocab_size), dtype),
        ("scratch", (r, kernels.scratch_words), f32),
        ("tokens", (r,), i32),
        ("logprobs", (r,), f32),
        ("top_ids", (r, MAX_LOGPROBS), i32),
        ("top_logprobs", (r, MAX_LOGPROBS), f32),
    ]
    b = min(SCORE_ROWS, t)
    work += [
        ("score_hidden", (b, spec.hidden_size), dtype),
        ("score_normed", (b, spec.hidden_size), dtype),
        ("score_logits", (b, spec.vocab_size), dtype),
        ("score_scratch", (b, kernels.score_words), f32),
        ("score_targets", (b,), i32),
        ("score_logprobs", (b,), f32),
        ("score_top_ids", (b, MAX_LOGPROBS), i32),
        ("score_top_logprobs", (b, MAX_LOGPROBS), f32),
    ]
    declared = [Declared(name, shape, i32, Padding.PREPARED) for name, shape in prepared]
    declared += [Declared(name, shape, kind, Padding.WRITTEN) for name, shape, kind in work]
    declared.append(Declared("inputs", (layout.width,), i32, Padding.HOST))
    declared.append(Declared("arrivals", (r, spec.num_kv_heads), i32, Padding.STATE))
    declared.append(Declared("split_arrivals", (kernels.split_arrivals,), i32, Padding.STATE))
    declared.append(Declared("counter", (1,), torch.int64, Padding.STATE))
    declared.append(Declared("launches", (1,), torch.int64, Padding.STATE))
    declared.append(Declared("history", (slots, spec.vocab_size), i32, Padding.STATE))
    return declared


class Buffers:
    """The static arena, the slot table, and the host's side of both (inbox, token ring and masks, pinned)."""

    def __init__(
        self, spec: ModelSpec, sizes: BufferSizes, slots: SlotTable, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.sizes = sizes
        self.slots = slots
        self.layout = InboxLayout(slots.stride, sizes.tokens)
        self.declared = declare(spec, sizes, self.layout, slots.words.shape[0], dtype)
        offsets, total = _layout(self.declared)
        self.arena = torch.zeros(total, dtype=torch.uint8, device=device)
        self._tensors = {
            d.name: self.arena[offset : offset + d.nbytes].view(d.dtype).view(d.shape)
            for d, offset in zip(self.declared, offsets, strict=True)
        }
        self["inputs"][ROWS : ROWS + MAX_ROWS] = slots.dummy
        self["counter"].fill_(1)
        pinned = device.type == "cuda"
        self.ring = torch.zeros(RING_DEPTH, sizes.rows, RING_FIELDS, dtype=torch.int64, pin_memory=pinned)
        self.inbox = torch.zeros(INBOX_DEPTH, self.layout.width, dtype=torch.int32, pin_memory=pinned)
        masks = slots.words.shape[0], mask_words(spec.vocab_size)
        self.masks = torch.zeros(masks, dtype=torch.int32, pin_memory=pinned)
        """Of the slots; ``ops/slots.py`` says what they are."""
        self._views: dict[GraphKey, tuple[Batch, Workspace]] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def views(self, key: GraphKey) -> tuple[Batch, Workspace]:
        """The step's tensors at a key's sizes: leading views, made once per key."""
        found = self._views.get(key)
        if found is None:
            tokens, rows = key.tokens, key.rows
            assert tokens <= self.sizes.tokens and rows <= self.sizes.rows, f"{key} is larger than the arena"
            found = self._batch(tokens, rows), self._workspace(tokens, rows)
            self._views[key] = found
        return found

    def _batch(self, tokens: int, rows: int) -> Batch:
        of_tokens = {name: self[name][:tokens] for name in ("token_ids", "positions", "token_slot")}
        of_rows = {name: self[name][:rows] for name in ("sample_index", "sample_slot", "sample_position")}
        return Batch(**of_tokens, **of_rows)

    def _workspace(self, tokens: int, rows: int) -> Workspace:
        of_tokens = ("hidden", "residual", "normed", "qkv", "q", "attended", "gate_up", "activated")
        shared = ("split_sums", "split_arrivals")
        views = {name: self[name] for name in Workspace.__dataclass_fields__}
        for name, tensor in views.items():
            if name not in shared:
                views[name] = tensor[: tokens if name in of_tokens else rows]
        return Workspace(**views)

    @property
    def header(self) -> torch.Tensor:
        """int32 ``[4]``: slot, start, count and emit of the chunk that the last launch received."""
        return self["inputs"][SLOT : EMIT + 1]

    @property
    def row_slot(self) -> torch.Tensor:
        """int32 ``[MAX_ROWS]``: slots of the decode step that the last launch received."""
        return self["inputs"][ROWS : ROWS + MAX_ROWS]

    @property
    def prompt(self) -> torch.Tensor:
        """int32 ``[T]``: ids of the chunk that the last launch received."""
        return self["inputs"][self.layout.prompt : self.layout.prompt + self.layout.prompt_words]

    def poison(self) -> None:
        """Fills all that ``Padding`` calls stale-safe with NaN and nonsense ids: for tests between steps."""
        for d in self.declared:
            if d.padding in (Padding.WRITTEN, Padding.PREPARED):
                self[d.name].fill_(float("nan") if d.dtype.is_floating_point else -(2**30))


def _layout(declared: list[Declared]) -> tuple[list[int], int]:
    """Byte offsets of the buffers, each on a 256-byte boundary, and their total."""
    offsets, total = [], 0
    for d in declared:
        offsets.append(total)
        total += (d.nbytes + 255) // 256 * 256
    return offsets, total
