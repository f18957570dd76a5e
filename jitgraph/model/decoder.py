"""One decoder for the native families: Llama, Mistral, Qwen2, Qwen3.

Runs on the engine's thread and stream, eagerly or under capture. Everything it writes is the caller's workspace or the
KV cache; nothing in it depends on data, so the same call serves eager steps, captures and padded batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jitgraph.model.batch import Batch, Workspace
from jitgraph.model.cache import KVCache
from jitgraph.model.spec import ModelSpec
from jitgraph.model.weights import LayerWeights, ModelWeights
from jitgraph.ops.reference import Rope
from jitgraph.ops.select import Ops
from jitgraph.ops.slots import SlotTable


@dataclass(frozen=True)
class Decoder:
    """A model ready to run: its figures, its tensors, its ops."""

    spec: ModelSpec
    weights: ModelWeights
    rope: Rope
    ops: Ops

    def forward(self, phase: str, batch: Batch, work: Workspace, cache: KVCache, slots: SlotTable) -> None:
        """Batch to ``work.logits`` ``[R, V]``; K and V of the step's tokens are in the cache afterwards."""
        for _ in self.stages(phase, batch, work, cache, slots):
            pass

    def stages(self, phase: str, batch: Batch, work: Workspace, cache: KVCache, slots: SlotTable) -> Iterator[None]:
        """``forward`` in pieces: yields after each layer, so that a capture can be advanced piece by piece."""
        ops, eps = self.ops, self.spec.rms_norm_eps
        ops.embed(batch.token_ids, self.weights.embedding, work.residual)
        ops.rms_norm(work.residual, self.weights.layers[0].input_norm, eps, work.normed)
        following = [layer.input_norm for layer in self.weights.layers[1:]] + [self.weights.final_norm]
        for index, layer in enumerate(self.weights.layers):
            self._attention(phase, index, layer, batch, work, cache, slots)
            ops.add_rms_norm(work.hidden, work.residual, layer.post_norm, eps, work.normed)
            ops.linear(work.normed, layer.gate_up, layer.gate_up_bias, work.gate_up)
            ops.silu_mul(work.gate_up, work.activated)
            ops.linear(work.activated, layer.down, layer.down_bias, work.hidden)
            ops.add_rms_norm(work.hidden, work.residual, following[index], eps, work.normed)
            yield
        ops.embed(batch.sample_index, work.normed, work.last_hidden)
        ops.linear(work.last_hidden, self.weights.lm_head, None, work.logits)
        yield

    def _attention(
        self,
        phase: str,
        index: int,
        layer: LayerWeights,
        batch: Batch,
        work: Workspace,
        cache: KVCache,
        slots: SlotTable,
    ) -> None:
        """``work.normed`` ``[T, D]`` to the attention block's output in ``work.hidden`` ``[T, D]``."""
        ops, spec = self.ops, self.spec
        k_cache, v_cache = cache.layer(index)
        scale, window = spec.head_dim**-0.5, spec.layer_windows[index]
        ops.linear(work.normed, layer.qkv, layer.qkv_bias, work.qkv)
        ops.rope_append(
            work.qkv,
            layer.q_norm,
            layer.k_norm,
            spec.rms_norm_eps,
            batch.positions,
            batch.token_slot,
            slots,
            self.rope,
            k_cache,
            v_cache,
            work.q,
        )
        where = (k_cache, v_cache, batch.positions, batch.token_slot, slots, scale, window)
        if phase == "decode":
            ops.decode_attention(work.q, *where, work.partial, work.partial_lse, work.attended)
        else:
            ops.prefill_attention(work.q, *where, work.attended)
        ops.linear(work.attended.view(-1, spec.q_size), layer.o, layer.o_bias, work.hidden)
