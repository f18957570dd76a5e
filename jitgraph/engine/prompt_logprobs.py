"""Log-probabilities of a prompt's own tokens, for requests that ask for them.

Engine's thread and stream. Such a prompt runs chunk by chunk and eagerly: each chunk's step has its sampling outside,
and between its logits and that the LM head is applied to all of its rows, a block of ``SCORE_ROWS`` at a time, in
buffers of the arena. What comes out is copied into pinned host memory on the stream, in front of the step's last op, so
it is there when the step's record is: nothing is waited for, and nothing is allocated on the device.
"""

from __future__ import annotations

from array import array
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch

from jitgraph.engine.scheduler import PrefillPlan, Sequence
from jitgraph.graphs.step import StepProgram
from jitgraph.types import MAX_LOGPROBS, PromptLogprobs, TokenLogprobs

FLIGHTS = 2
"""Steps in flight at most; each has a place of its own for what comes back."""


class _Pending(NamedTuple):
    """A step whose results are on their way."""

    sequence: Sequence
    targets: list[int]
    """Ids that were scored: the token after each of the chunk's own."""


class PromptScorer:
    """One engine's."""

    def __init__(self, program: StepProgram) -> None:
        buffers = program.buffers
        self._program = program
        self._targets = buffers["score_targets"]
        self._block = self._targets.shape[0]
        most = -(-buffers.sizes.tokens // self._block) * self._block
        names = ("score_logprobs", "score_top_ids", "score_top_logprobs")
        self._results = tuple(buffers[name] for name in names)
        pinned = buffers.arena.device.type == "cuda"
        self._ids = torch.zeros(FLIGHTS, most, dtype=torch.int32, pin_memory=pinned)
        """Targets on their way to the device, and results on their way back: by step, then by token of the chunk."""
        self._host = tuple(
            torch.zeros(FLIGHTS, most, *result.shape[1:], dtype=result.dtype, pin_memory=pinned)
            for result in self._results
        )
        self._found: WeakKeyDictionary[Sequence, list[TokenLogprobs]] = WeakKeyDictionary()
        self._width = min(MAX_LOGPROBS, program.decoder.spec.vocab_size)
        self.pending: dict[int, _Pending] = {}
        """By the number of the step."""

    def warm_up(self) -> None:
        """Runs what ``run`` runs, once: compiles, loads and settles all of it. Before ready."""
        self._targets.zero_()
        self._program.score(0, min(self._block, self._program.buffers.sizes.tokens))

    def run(self, plan: PrefillPlan, step: int) -> None:
        """Enqueues the scoring of a chunk whose logits have just been enqueued. A prompt's last token foretells the
        first one of the output, which is none of its own."""
        prompt, end = plan.sequence.request.prompt_token_ids, plan.start + plan.count
        targets = list(prompt[plan.start + 1 : end + 1])
        self.pending[step] = _Pending(plan.sequence, targets)
        place = step % FLIGHTS
        ids = self._ids[place]
        ids.numpy()[: len(targets)] = array("i", targets)
        for first in range(0, len(targets), self._block):
            count = min(self._block, len(targets) - first)
            self._targets.copy_(ids[first : first + self._block], non_blocking=True)
            self._program.score(first, count)
            for result, host in zip(self._results, self._host, strict=True):
                host[place, first : first + count].copy_(result[:count], non_blocking=True)

    def collect(self, step: int) -> None:
        """Takes the results of a step whose record has been read, if it has any."""
        pending = self.pending.pop(step, None)
        if pending is None or pending.sequence.finished is not None:
            return
        count, targets = len(pending.targets), pending.targets
        wanted = min(pending.sequence.request.prompt_logprobs or 0, self._width)
        logprobs, ids, values = (host[step % FLIGHTS, :count] for host in self._host)
        tops = zip(ids[:, :wanted].tolist(), values[:, :wanted].tolist(), strict=True)
        found = self._found.setdefault(pending.sequence, [])
        found += [
            TokenLogprobs(target, logprob, tuple(zip(*top, strict=True)))
            for target, logprob, top in zip(targets, logprobs.tolist(), tops, strict=True)
        ]

    def take(self, sequence: Sequence) -> PromptLogprobs | None:
        """The log-probabilities of a prompt that has run to its end, once; None where nobody asked."""
        if sequence.request.prompt_logprobs is None:
            return None
        return (None, *self._found.pop(sequence, ()))

    def forget(self) -> None:
        """Gives up what is on its way, after a launch that did not complete."""
        self.pending.clear()
