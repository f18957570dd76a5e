"""The step itself: receive, prepare, forward, sample, append - what a graph captures and what an eager step runs.

Engine's thread and stream. ``graph_stages`` is the one code path of every phase; it reads and writes declared buffers
only, and the host decides nothing inside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from jitgraph.graphs.buffers import Buffers
from jitgraph.graphs.key import GraphKey, Phase, Sampling
from jitgraph.model.cache import KVCache
from jitgraph.model.decoder import Decoder, Section
from jitgraph.model.hf_decoder import HfDecoder, OwnCacheDecoder
from jitgraph.ops.reference_linear import SplitScratch


class StepProgram:
    """A decoder bound to its buffers.

    ``next_step`` and ``next_launch`` are the numbers that the host will give away next. Plain-PyTorch ops need such
    numbers on the host (see ``reference.receive`` and ``reference_sampling.advance``): on a GPU, where they run as they
    are launched, these; on the CPU, where a queued loop runs later, those of the device's own counters.
    """

    def __init__(self, decoder: Decoder | HfDecoder | OwnCacheDecoder, buffers: Buffers, cache: KVCache) -> None:
        self.decoder = decoder
        self.buffers = buffers
        self.cache = cache
        self.next_step = 1
        self.next_launch = 0
        self._on_cpu = buffers.arena.device.type == "cpu"

    # ------------------------------------------------------------------------------------------------------ whole steps

    def before_graph(self, key: GraphKey) -> None:
        """What a launch of ``key`` runs before its graph: the inputs' copy, where a graph cannot hold it."""
        if not self.decoder.ops.receives_on_device:
            self.receive(key)

    def graph_stages(self, key: GraphKey, scored: bool = False, brief: bool = False) -> Iterator[None]:
        """What a graph of ``key`` contains, in pieces: the whole step, or all up to the logits where sampling is
        outside. Each piece launches a few kernels. ``scored``: ``score`` follows. ``brief``: layers that do what others
        do are left out, so that all its kernels are launched and nothing that counts is computed."""
        if self.decoder.ops.receives_on_device:
            self.receive(key)
        yield from self.body_stages(key, scored, brief)

    def body_stages(self, key: GraphKey, scored: bool = False, brief: bool = False) -> Iterator[None]:
        """``graph_stages`` without the inputs' arrival: what a device-side loop repeats."""
        self.prepare(key)
        batch, work = self.buffers.views(key)
        yield from self.decoder.stages(key.phase.value, batch, work, self.cache, self.buffers.slots, scored, brief)
        if key.sampling is not Sampling.OUTSIDE:
            self.finish(key, key.sampling)  # no yield after it: whoever counts steps does so in the same breath

    def graph_part(self, key: GraphKey, scored: bool = False, brief: bool = False) -> Callable[[], None]:
        """``graph_stages`` as one call."""

        def run() -> None:
            for _ in self.graph_stages(key, scored, brief):
                pass

        return run

    def body_part(self, key: GraphKey) -> Callable[[], None]:
        """``body_stages`` as one call."""

        def run() -> None:
            for _ in self.body_stages(key):
                pass

        return run

    def sections(self, key: GraphKey) -> list[Section]:
        """``graph_stages`` cut where static and dynamic ops meet, for graphs that hold only the static ones."""
        batch, work = self.buffers.views(key)
        first = [Section(True, lambda: self.receive(key))] if self.decoder.ops.receives_on_device else []
        first.append(Section(True, lambda: self.prepare(key)))
        last = [] if key.sampling is Sampling.OUTSIDE else [Section(True, lambda: self.finish(key, key.sampling))]
        middle = self.decoder.sections(key.phase.value, batch, work, self.cache, self.buffers.slots)
        return first + middle + last

    # ------------------------------------------------------------------------------------------------------------ parts

    def receive(self, key: GraphKey) -> None:
        """The launch's inputs from the inbox to the device."""
        buffers = self.buffers
        self.decoder.ops.receive(
            buffers.inbox,
            buffers["launches"],
            int(buffers["launches"]) if self._on_cpu else self.next_launch,
            buffers.layout,
            key.phase is Phase.PREFILL,
            buffers["inputs"],
            buffers.slots,
        )

    def prepare(self, key: GraphKey) -> None:
        """Received inputs to the step's tensors."""
        ops, buffers = self.decoder.ops, self.buffers
        batch, _ = buffers.views(key)
        outputs = (
            batch.token_ids,
            batch.positions,
            batch.token_slot,
            batch.sample_index,
            batch.sample_slot,
            batch.sample_position,
        )
        if key.phase is Phase.PREFILL:
            ops.prepare_prefill(buffers.header, buffers.prompt, buffers.slots.dummy, *outputs)
            ops.note_prompt(*outputs[:3], buffers.slots, buffers["history"])
        else:
            ops.prepare_decode(buffers.row_slot[: key.rows], buffers.slots, *outputs)

    def finish(self, key: GraphKey, sampling: Sampling) -> None:
        """Logits to tokens in their slots and in the ring."""
        ops, buffers = self.decoder.ops, self.buffers
        batch, work = buffers.views(key)
        where = (batch.sample_slot, batch.sample_position)
        report = (work.logprobs, work.top_ids, work.top_logprobs)
        if sampling is Sampling.GREEDY:
            ops.greedy(work.logits, *where, buffers.slots, work.scratch, work.tokens)
            ops.advance(*where, work.tokens, None, None, None, buffers.slots, None, *self._publication())
        else:
            history = buffers["history"]
            state = (buffers.slots, history, buffers.masks)
            ops.sample(work.logits, *where, *state, work.scratch, work.tokens, *report)
            ops.advance(*where, work.tokens, *report, buffers.slots, history, *self._publication())

    def score(self, first: int, count: int) -> None:
        """Scores ``count`` tokens of the step from ``first`` on: the log-probabilities of ``score_targets``, in the
        ``score_`` buffers. It comes between the logits and the end of a step whose sampling is outside its graph. So
        that one shape serves all, it always computes as many rows; what stands in the others is of no use."""
        decoder, buffers = self.decoder, self.buffers
        logits = buffers["score_logits"]
        scratch = SplitScratch(buffers["split_sums"], buffers["split_arrivals"])
        places = (buffers["residual"], buffers["score_hidden"], buffers["score_normed"])
        decoder.score(first, logits, count, *places, scratch)
        report = (buffers["score_logprobs"], buffers["score_top_ids"], buffers["score_top_logprobs"])
        decoder.ops.score(logits, buffers["score_targets"], buffers["score_scratch"], *report)

    def _publication(self) -> tuple[object, object, int]:
        counter = self.buffers["counter"]
        return counter, self.buffers.ring, int(counter) if self._on_cpu else self.next_step
