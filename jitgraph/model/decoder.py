"""One decoder for the native families: Llama, Mistral, Qwen2, Qwen3.

Runs on the engine's thread and stream, eagerly or under capture. Everything it writes is the caller's workspace or the
KV cache; nothing in it depends on data, so the same call serves eager steps, captures and padded batches.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from jitgraph.model.batch import Batch, Workspace
from jitgraph.model.cache import KVCache
from jitgraph.model.spec import ModelSpec
from jitgraph.model.weights import LayerWeights, ModelWeights
from jitgraph.ops.reference import Rolling, Rope
from jitgraph.ops.reference_linear import SplitScratch
from jitgraph.ops.reference_prefill import JOINED_TOKENS
from jitgraph.ops.select import Op, Ops
from jitgraph.ops.slots import SlotTable

ALIGNMENT_BYTES = 16
"""What Triton asks of a pointer; cuBLAS asks for no more."""


@dataclass(frozen=True)
class KVWindow:
    """A KV cache that rolls: the first ``sinks`` tokens of a sequence and its latest ``recent`` ones."""

    sinks: int
    recent: int

    @property
    def cells(self) -> int:
        """Tokens of a sequence that the cache holds."""
        return self.sinks + self.recent


@dataclass(frozen=True)
class Section:
    """A stretch of a step between two places where it may be cut."""

    dynamic: bool
    """Whether it reads what changes from step to step (positions, pages); the others compute the same every time."""
    run: Callable[[], None]


@dataclass(frozen=True)
class Decoder:
    """A model ready to run: its figures, its tensors, its ops."""

    native: ClassVar[bool] = True
    """Whether each step is known to be capturable, and comes in short pieces."""
    capturable: ClassVar[bool] = True
    """Whether there is any use in trying to capture its steps."""
    spec: ModelSpec
    weights: ModelWeights
    rope: Rope
    ops: Ops
    window: KVWindow | None = None

    @property
    def one_launch(self) -> Op | None:
        """The op that does a prompt chunk's RoPE, append and attention at once; None where this model, its cache or its
        ops want them apart."""
        plain = not self.spec.qk_norm and self.window is None and not self.rope.dynamic_original
        return self.ops.rope_prefill_attention if plain else None

    def forward(
        self, phase: str, batch: Batch, work: Workspace, cache: KVCache, slots: SlotTable, whole: bool = False
    ) -> None:
        """Batch to ``work.logits`` ``[R, V]``; K and V of the step's tokens are in the cache afterwards.

        Behind the last layer's attention a prompt's step goes on with the rows that get a token alone, since nobody
        reads the others. ``whole`` keeps all of them, for ``score``."""
        for section in self.sections(phase, batch, work, cache, slots, whole):
            section.run()

    def stages(
        self,
        phase: str,
        batch: Batch,
        work: Workspace,
        cache: KVCache,
        slots: SlotTable,
        whole: bool = False,
        brief: bool = False,
    ) -> Iterator[None]:
        """``forward`` in pieces: yields after each layer's half, so that a capture can be advanced piece by piece.
        ``brief``: see ``sections``."""
        for section in self.sections(phase, batch, work, cache, slots, whole, brief):
            section.run()
            yield

    def sections(
        self,
        phase: str,
        batch: Batch,
        work: Workspace,
        cache: KVCache,
        slots: SlotTable,
        whole: bool = False,
        brief: bool = False,
    ) -> list[Section]:
        """``forward`` as a list, to be run in order. Three sections a layer, and one at each end. ``brief`` has only
        layers that between them launch whatever any layer launches: enough to know all kernels, or to have them
        loaded."""
        run = _Pass(self, phase, batch, work, cache, slots, whole)
        found = [Section(False, run.begin)]
        layers = self.weights.layers
        for index in self._one_of_each_kind(cache) if brief else range(len(layers)):
            layer = layers[index]
            found += [
                Section(False, partial(run.attention_input, layer)),
                Section(True, partial(run.attention, index, layer)),
                Section(False, partial(run.attention_output_and_mlp, index, layer)),
            ]
        return [*found, Section(False, run.end)]

    def _one_of_each_kind(self, cache: KVCache) -> list[int]:
        """The first layer of each kind, and the last one, which may go on with fewer rows. Of a kind are those with the
        same tensors, window, and alignment of each tensor, by which Triton tells kernels apart."""
        kinds: dict[Hashable, int] = {}
        for index, layer in enumerate(self.weights.layers):
            tensors = (*vars(layer).values(), *cache.layer(index))
            places = tuple(None if one is None else one.data_ptr() % ALIGNMENT_BYTES for one in tensors)
            kinds.setdefault((self.spec.layer_windows[index], places), index)
        return sorted({*kinds.values(), len(self.weights.layers) - 1})

    def score(
        self,
        first: int,
        logits: torch.Tensor,
        count: int,
        residual: torch.Tensor,
        hidden: torch.Tensor,
        normed: torch.Tensor,
        scratch: SplitScratch,
    ) -> None:
        """Logits of ``count`` tokens of the step before, from ``first`` on, from what it left in ``residual``
        ``[T, D]``. hidden, normed ``[B, D]`` and logits ``[B, V]`` have one shape for all; what stands in the other
        rows is of no use."""
        hidden[:count].copy_(residual[first : first + count], non_blocking=True)
        head = (self.weights.lm_head, None, normed, logits, scratch)
        self.ops.norm_linear(None, hidden, self.weights.final_norm, self.spec.rms_norm_eps, *head)


class _Pass:
    """One forward pass: the residual, and what is still to be added to it."""

    def __init__(
        self, decoder: Decoder, phase: str, batch: Batch, work: Workspace, cache: KVCache, slots: SlotTable, whole: bool
    ) -> None:
        self._decoder = decoder
        self._phase = phase
        self._batch = batch
        self._work = work
        self._cache = cache
        self._slots = slots
        self._ops = decoder.ops
        self._eps = decoder.spec.rms_norm_eps
        self._scratch = SplitScratch(work.split_sums, work.split_arrivals)
        self._pending: torch.Tensor | None = None
        tokens, rows = batch.positions.shape[0], batch.sample_index.shape[0]
        self._trimmed_layer = decoder.spec.num_layers - 1 if rows < tokens and not whole else None
        """From behind whose attention on only the rows that get a token are computed."""
        joined = phase == "prefill" and tokens <= JOINED_TOKENS
        self._one_launch = decoder.one_launch if joined else None
        window = decoder.window
        self._in_qkv = decoder.ops.chunk_attention if phase == "prefill" and window is None else None
        self._rolling = (
            Rolling(window.sinks, window.recent, batch.sample_position, decoder.rope.cos_sin) if window else None
        )

    def begin(self) -> None:
        """Token ids to the residual ``[T, D]``."""
        self._pending = None  # an emulated graph runs its sections again at each replay
        self._ops.embed(self._batch.token_ids, self._decoder.weights.embedding, self._work.residual)

    def attention_input(self, layer: LayerWeights) -> None:
        """Residual to ``work.qkv``."""
        work = self._work
        self._ops.norm_linear(
            self._pending,
            work.residual,
            layer.input_norm,
            self._eps,
            layer.qkv,
            layer.qkv_bias,
            work.normed,
            work.qkv,
            self._scratch,
        )
        self._pending = None

    def attention(self, index: int, layer: LayerWeights) -> None:
        """``work.qkv`` to ``work.attended`` ``[T, Hq, Dh]``, K and V to the cache."""
        ops, spec, batch, work = self._ops, self._decoder.spec, self._batch, self._work
        k_cache, v_cache = self._cache.layer(index)
        how = (spec.head_dim**-0.5, spec.layer_windows[index])
        if self._one_launch is not None:
            tokens = (batch.positions, batch.token_slot, self._slots)
            self._one_launch(
                work.qkv, *tokens, self._decoder.rope, k_cache, v_cache, *how, work.attended, self._scratch
            )
            return
        ops.rope_append(
            work.qkv,
            layer.q_norm,
            layer.k_norm,
            self._eps,
            batch.positions,
            batch.token_slot,
            self._slots,
            self._decoder.rope,
            k_cache,
            v_cache,
            None if self._in_qkv is not None else work.q,
            self._rolling,
        )
        where = (k_cache, v_cache, batch.positions, batch.token_slot, self._slots)
        if self._phase == "decode":
            splits = (work.partial, work.partial_lse, work.arrivals)
            ops.decode_attention(work.q, *where, *how, *splits, work.attended, self._rolling)
        elif self._in_qkv is not None:
            self._in_qkv(work.qkv, *where, *how, work.attended)
        else:
            ops.prefill_attention(work.q, *where, *how, work.attended, self._rolling)

    def attention_output_and_mlp(self, index: int, layer: LayerWeights) -> None:
        """``work.attended`` through the rest of the layer to the residual, which is ``work.last_hidden`` where only
        some rows go on."""
        ops, work, size = self._ops, self._work, self._decoder.spec.q_size
        attended, residual = work.attended.view(-1, size), work.residual
        if index == self._trimmed_layer:
            wanted = self._batch.sample_index
            kept = work.q.view(-1, size)[: wanted.shape[0]]  # the queries have been used
            ops.embed(wanted, attended, kept)
            ops.embed(wanted, residual, work.last_hidden)
            attended, residual = kept, work.last_hidden
        rows = residual.shape[0]
        hidden, activated = work.hidden[:rows], work.activated[:rows]
        pending = ops.linear_add(attended, layer.o, layer.o_bias, hidden, residual, self._scratch)
        ops.norm_gated(
            pending,
            residual,
            layer.post_norm,
            self._eps,
            layer.gate_up,
            layer.gate_up_bias,
            work.normed[:rows],
            work.gate_up[:rows],
            activated,
            self._scratch,
        )
        self._pending = ops.linear_add(activated, layer.down, layer.down_bias, hidden, residual, self._scratch)

    def end(self) -> None:
        """The residual of the rows that get a token to ``work.logits`` ``[R, V]``."""
        ops, work, weights = self._ops, self._work, self._decoder.weights
        trimmed = self._trimmed_layer is not None
        if self._pending is not None:
            (work.last_hidden if trimmed else work.residual).add_(self._pending)
        if not trimmed:
            ops.embed(self._batch.sample_index, work.residual, work.last_hidden)
        logits = (weights.lm_head, None, work.last_normed, work.logits, self._scratch)
        ops.norm_linear(None, work.last_hidden, weights.final_norm, self._eps, *logits)
