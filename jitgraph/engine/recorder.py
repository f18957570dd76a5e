"""What a step that has been read says: each sequence's token, what belongs to it, and whether the sequence has ended.

Engine's thread.
"""

from __future__ import annotations

from jitgraph.engine.constraint import Constraints
from jitgraph.engine.flights import InFlight
from jitgraph.engine.runner import Runner
from jitgraph.engine.scheduler import Scheduler, Sequence
from jitgraph.types import FinishReason, TokenChunk, TokenLogprobs


class Recorder:
    """One engine's."""

    def __init__(self, runner: Runner, scheduler: Scheduler, vocab_size: int) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._constraints: Constraints = runner.constraints
        self._vocab_size = vocab_size

    def record(self, flight: InFlight, tokens: list[int], now: int) -> list[TokenChunk]:
        """Takes note of the step of a flight that was read last, at ``now`` (ns); tokens of sequences that had ended
        before say nothing."""
        chunks = []
        if not flight.sequences:
            self._scheduler.chunk_read(flight.plan)
        for row, sequence in enumerate(flight.sequences):
            if self._scheduler.record(sequence, tokens[row]):
                request = sequence.request
                if request.grammar is not None:
                    self._follow(sequence, tokens[row])
                logprobs = self._logprobs(flight.step - 1, row, sequence)
                first = len(sequence.tokens) == 1
                once = (sequence.cached, self._runner.scorer.take(sequence)) if first else ()
                chunks.append(TokenChunk(request.request_id, tokens[row], now, logprobs, sequence.finished, *once))
        return chunks

    def _follow(self, sequence: Sequence, token: int) -> None:
        """Ends a sequence whose grammar is complete, or cannot be followed."""
        reason = self._constraints.follow(sequence, token) if sequence.finished is not FinishReason.STOP else None
        if reason is not None and sequence.finished is None:
            self._scheduler.finish(sequence, reason)
        elif reason is FinishReason.STOP:
            sequence.finished = reason  # complete with the last token there was room for: nothing is missing
        if sequence.finished is not None:
            self._constraints.drop(sequence)

    def _logprobs(self, step: int, row: int, sequence: Sequence) -> TokenLogprobs | None:
        count = sequence.request.params.logprobs
        if count is None:
            return None
        return self._runner.reader.logprobs(step, row, min(count, self._vocab_size))
