"""Attention over the paged KV cache, as the forward of a model in transformers calls it.

Engine's thread and stream. transformers lets a model's attention be replaced by a function that is registered under a
name. This one writes the step's keys and values into their pages and attends over what is there; all the rest of the
forward (embeddings, norms, RoPE, MLPs, experts) is the model's own. A step is one row of tokens ``[1, T]``, whichever
sequences they belong to: outside attention no token meets another. What differs from step to step is data in the
batch, so a captured forward is right for every request.

Letters as in ``ops/reference.py``; Dk and Dv are the sizes of a head's key and value in one layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from jitgraph.model.batch import Batch, Workspace
from jitgraph.model.cache import KVCache
from jitgraph.ops.select import Ops
from jitgraph.ops.slots import SlotTable

NAME = "jitgraph"
"""Under which transformers knows ``attention``."""
_MOST_SCORES = 2**25
"""Scores that are computed at once, over all heads; where there are more, one KV head at a time: 128 MiB."""


@dataclass
class PagedPass:
    """One forward pass: where its layers find their pages. ``layers`` are those of the model, by their index in it."""

    phase: str
    batch: Batch
    work: Workspace | None
    """None computes in plain PyTorch, wherever it may."""
    cache: KVCache
    slots: SlotTable
    ops: Ops | None
    layers: dict[int, int]
    """A layer's own index to its place in the cache."""
    _pages: torch.Tensor | None = field(default=None, init=False)
    _cells: torch.Tensor | None = field(default=None, init=False)

    def append(self, place: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes k ``[T, Hkv, Dk]`` and v ``[T, Hkv, Dv]`` of the step; returns the layer's pages, ``[N, G, Hkv, Dk]``
        and ``[N, G, Hkv, Dv]``."""
        k_cache, v_cache = self.cache.layer(place)
        k_cache = k_cache[:, :, : key.shape[1], : key.shape[2]]
        v_cache = v_cache[:, :, : value.shape[1], : value.shape[2]]
        if self._pages is None or self._cells is None:  # the same for all layers
            page_size, positions = k_cache.shape[1], self.batch.positions.long()
            table = self.slots.block_table()
            self._pages = table[self.batch.token_slot.long(), positions // page_size].long()
            self._cells = positions % page_size
        k_cache[self._pages, self._cells] = key.to(k_cache.dtype)
        v_cache[self._pages, self._cells] = value.to(v_cache.dtype)
        return k_cache, v_cache

    def attend(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        scale: float,
        window: int,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of q ``[T, Hq, Dk]`` over the pages; ``[T, Hq, Dv]``."""
        batch, work = self.batch, self.work
        if work is not None and self.ops is not None and softcap is None and sinks is None:
            fits = q.shape == work.q.shape and k_cache.is_contiguous() and v_cache.is_contiguous()
            if fits and q.dtype == work.q.dtype:
                work.q.copy_(q)
                tokens = (batch.positions, batch.token_slot, self.slots)
                if self.phase == "decode":
                    splits = (work.partial, work.partial_lse, work.arrivals)
                    self.ops.decode_attention(
                        work.q, k_cache, v_cache, *tokens, scale, window, *splits, work.attended
                    )  # fmt: skip
                else:
                    self.ops.prefill_attention(work.q, k_cache, v_cache, *tokens, scale, window, work.attended)
                return work.attended
        owner = batch.token_slot[:1] if self.phase == "prefill" else batch.token_slot
        table = self.slots.block_table()[owner.long()]
        return paged_attention(q, k_cache, v_cache, table, batch.positions, scale, window, softcap, sinks)


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    table: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    window: int,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Plain causal attention with what some families add; ``[T, Hq, Dv]`` in q's dtype.

    table int32 ``[1, P]``, the pages of the one sequence of all tokens, or ``[T, P]``, those of each token's own. Token
    t sees key positions j <= positions[t], and with a window w > 0 only positions[t] - j < w. With ``softcap`` c the
    scores s become c * tanh(s / c); ``sinks`` ``[Hq]`` are scores of one more key per head whose value is zero. Sums
    are in float32.
    """
    page_size, kv_heads = k_cache.shape[1], k_cache.shape[2]
    if table.device.type == "cpu":  # the device is the host here: gather only what is in use
        table = table[:, : int(positions.max()) // page_size + 1]
    pages = table.long()
    tokens, heads, size = q.shape
    group = heads // kv_heads
    keys = pages.shape[1] * page_size
    j = torch.arange(keys, dtype=torch.int32, device=q.device)
    seen = j[None] <= positions[:, None]
    if window > 0:
        seen = seen & (positions[:, None] - j[None] < window)
    out = q.new_empty(tokens, heads, v_cache.shape[3])
    grouped = q.reshape(tokens, kv_heads, group, size).float()
    rows = "t" if pages.shape[0] == tokens else "u"  # u is one: the pages of all tokens
    read = seen if rows == "t" else seen.any(0, keepdim=True)  # 0 times what nobody wrote may not be 0
    at_once = kv_heads if tokens * heads * keys <= _MOST_SCORES else 1
    for first in range(0, kv_heads, at_once):
        some = slice(first, first + at_once)
        k = k_cache[:, :, some][pages].flatten(1, 2).float()
        v = v_cache[:, :, some][pages].flatten(1, 2).float()
        v = torch.where(read[..., None, None], v, 0.0)
        scores = torch.einsum(f"thgd,{rows}khd->thgk", grouped[:, some], k) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
        if sinks is not None:
            extra = sinks.float().view(1, kv_heads, group, 1)[:, some].expand(tokens, -1, -1, 1)
            shares = torch.softmax(torch.cat((scores, extra), dim=-1), dim=-1)[..., :-1]
        else:
            shares = torch.softmax(scores, dim=-1)
        mixed = torch.einsum(f"thgk,{rows}khd->thgd", shares, v)
        out[:, first * group : (first + at_once) * group] = mixed.flatten(1, 2).to(q.dtype)
    return out


@dataclass(frozen=True)
class LayerCall:
    """How a layer called its attention: what sizes the cache and says whether the pages can serve it."""

    index: int
    """Its own, in the model; -1 where it has none."""
    heads: int
    kv_heads: int
    key_size: int
    value_size: int
    window: int
    unknown: tuple[str, ...]
    """Arguments that change the result and that ``attention`` does not know."""


_PASS: ContextVar[PagedPass | list[LayerCall] | None] = ContextVar("jitgraph_pass", default=None)
"""What the forward under way works on: pages, or a list that notes how layers call."""
_HARMLESS = frozenset(
    {
        *("dropout", "is_causal", "position_ids", "cache_position", "past_key_value", "past_key_values", "use_cache"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "head_mask", "layer_idx", "training"),
        *("token_type_ids", "position_embeddings", "return_dict", "logits_to_keep"),
    }
)
"""Arguments that say nothing that the pass does not know, or that are off."""


@contextmanager
def working_on(what: PagedPass | list[LayerCall]) -> Iterator[None]:
    """Inside, forwards of this thread work on ``what``."""
    token = _PASS.set(what)
    try:
        yield
    finally:
        _PASS.reset(token)


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What layers call: query ``[1, Hq, T, Dk]``, key ``[1, Hkv, T, Dk]``, value ``[1, Hkv, T, Dv]``; returns
    ``[1, T, Hq, Dv]``. The mask is the pass's own affair."""
    current = _PASS.get()
    assert current is not None, "this forward belongs to an engine, which alone may call it"
    index = getattr(module, "layer_idx", None)
    index = index if isinstance(index, int) else -1
    if isinstance(current, list):
        unknown = [name for name, given in others.items() if given is not None and name not in _HARMLESS]
        unknown += ["attention_mask"] if attention_mask is not None else []
        unknown += [] if query.shape[0] == 1 else ["a batch"]
        unknown += [] if query.shape[2] == key.shape[2] == value.shape[2] else ["other keys"]
        call = LayerCall(
            index,
            *(query.shape[1], key.shape[1], key.shape[3], value.shape[3]),
            sliding_window or 0,
            tuple(unknown),
        )
        current.append(call)
        shape = (1, query.shape[2], query.shape[1], value.shape[3])
        return query.new_zeros(shape), None
    scale = query.shape[3] ** -0.5 if scaling is None else float(scaling)
    pages = current.append(current.layers[index], key[0].transpose(0, 1), value[0].transpose(0, 1))
    q = query[0].transpose(0, 1)
    return current.attend(q, *pages, scale, sliding_window or 0, softcap, s_aux)[None], None


def register(transformers: Any) -> None:
    """Tells transformers of ``attention``; doing so again changes nothing."""
    transformers.AttentionInterface.register(NAME, attention)
