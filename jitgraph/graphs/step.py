"""The step itself: prepare, forward, sample, append - what a graph captures and what an eager step runs.

Engine's thread and stream. ``StepProgram.run(key)`` is the one code path of every phase; it reads and writes declared
buffers only, and the host decides nothing inside it.
"""

from __future__ import annotations

from collections.abc import Callable

from jitgraph.graphs.buffers import HEADER, Buffers
from jitgraph.graphs.key import GraphKey, Phase, Sampling
from jitgraph.model.cache import KVCache
from jitgraph.model.decoder import Decoder


class StepProgram:
    """A decoder bound to its buffers.

    ``host_step`` mirrors the device's step counter; only plain-PyTorch ops read it (see
    ``reference_sampling.advance``).
    """

    def __init__(self, decoder: Decoder, buffers: Buffers, cache: KVCache) -> None:
        self.decoder = decoder
        self.buffers = buffers
        self.cache = cache
        self.host_step = 1

    def captured_part(self, key: GraphKey) -> Callable[[], None]:
        """What a graph of ``key`` contains: the whole step, or all up to the logits where sampling is outside."""
        if key.sampling is Sampling.OUTSIDE:
            return lambda: self.forward(key)
        return lambda: self._whole(key, key.sampling)

    def _whole(self, key: GraphKey, sampling: Sampling) -> None:
        self.forward(key)
        self.finish(key, sampling)

    def forward(self, key: GraphKey) -> None:
        """Staged inputs to logits."""
        ops, buffers = self.decoder.ops, self.buffers
        batch, work = buffers.views(key)
        outputs = (
            batch.token_ids,
            batch.positions,
            batch.token_slot,
            batch.sample_index,
            batch.sample_slot,
            batch.sample_position,
        )
        if key.phase is Phase.PREFILL:
            prompt = buffers["prompt"]
            ops.prepare_prefill(prompt[:HEADER], prompt[HEADER:], buffers.slots.dummy, *outputs)
        else:
            ops.prepare_decode(buffers["row_slot"][: key.rows], buffers.slots, *outputs)
        self.decoder.forward(key.phase.value, batch, work, self.cache, buffers.slots)

    def finish(self, key: GraphKey, sampling: Sampling) -> None:
        """Logits to tokens in their slots and in the ring."""
        ops, buffers = self.decoder.ops, self.buffers
        batch, work = buffers.views(key)
        where = (batch.sample_slot, batch.sample_position)
        inputs = (work.logits, *where, buffers.slots, work.scratch, work.tokens)
        report = (work.logprobs, work.top_ids, work.top_logprobs)
        if sampling is Sampling.GREEDY:
            ops.greedy(*inputs)
            ops.advance(*where, work.tokens, None, None, None, buffers.slots, *self._publication())
        else:
            ops.sample(*inputs, *report)
            ops.advance(*where, work.tokens, *report, buffers.slots, *self._publication())

    def _publication(self) -> tuple[object, object, int]:
        return self.buffers["counter"], self.buffers.ring, self.host_step
