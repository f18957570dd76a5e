"""Who runs in the next step. Pure Python, no torch; engine's thread only.

Admission reserves every page a sequence can need (prompt and max_tokens), so a running sequence never waits for memory
and nothing is ever taken back. Prompt chunks and decode steps alternate, so neither starves the other.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from jitgraph.types import FinishReason, Request


@dataclass(eq=False)
class Sequence:
    """A request in the engine: its place, its pages, and how far it is. ``launched`` runs ahead of ``tokens``."""

    request: Request
    max_length: int
    """Tokens of prompt and output together at which it ends."""
    stop_ids: frozenset[int]
    pages_needed: int
    seed: int = 0
    """Of its draws."""
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    prefilled: int = 0
    """Prompt tokens whose step has been launched."""
    launched: int = 0
    """Output tokens whose step has been launched."""
    tokens: list[int] = field(default_factory=list)
    """Output tokens the host has read."""
    finished: FinishReason | None = None

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def sorted_stop_ids(self) -> tuple[int, ...]:
        """The stop ids in one order."""
        return tuple(sorted(self.stop_ids))

    @property
    def remaining(self) -> int:
        """Output tokens whose step has not been launched."""
        return self.max_length - self.prompt_length - self.launched

    @property
    def decoding(self) -> bool:
        """Whether a decode step may be launched for it now."""
        return self.finished is None and self.prefilled == self.prompt_length and self.remaining > 0


@dataclass(frozen=True)
class PrefillPlan:
    """One chunk of one prompt."""

    sequence: Sequence
    start: int
    count: int
    emit: bool
    """Whether the chunk ends the prompt, so that the step gives a token."""


@dataclass(frozen=True)
class DecodePlan:
    """One token of each of these sequences, in row order."""

    sequences: tuple[Sequence, ...]


@dataclass(frozen=True)
class LoopPlan:
    """Up to ``count`` tokens of one sequence, step after step without the host."""

    sequence: Sequence
    count: int


Plan = PrefillPlan | DecodePlan | LoopPlan


class PageBook(Protocol):
    """Who hands out KV pages (``model.cache.PageAllocator``)."""

    @property
    def free(self) -> int: ...

    def take(self, count: int) -> list[int] | None: ...

    def upcoming(self, most: int) -> list[int]: ...

    def give_back(self, pages: list[int]) -> None: ...


class Scheduler:
    """Slots, pages and the queue."""

    def __init__(self, max_streams: int, chunk_tokens: int, pages: PageBook) -> None:
        self._chunk = chunk_tokens
        self._pages = pages
        self._free_slots = list(range(max_streams - 1, -1, -1))
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._prompt_next = True

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence; first come, first served."""
        self.waiting.append(sequence)

    def admit(self) -> Sequence | None:
        """Moves the oldest waiting sequence into a free slot; None where there is none, or no slot, or not its
        pages."""
        if not self.admissible:
            return None
        pages = self._pages.take(self.waiting[0].pages_needed)
        assert pages is not None
        sequence = self.waiting.popleft()
        sequence.pages, sequence.slot = pages, self._free_slots.pop()
        self.running.append(sequence)
        return sequence

    def admit_whole(self, sequence: Sequence) -> bool:
        """Admits a sequence that never waited and counts its whole prompt as launched, which fits one step; False, and
        nothing done, where anybody else is there or pages are short."""
        if self.running or self.waiting or sequence.prompt_length > self._chunk:
            return False
        pages = self._pages.take(sequence.pages_needed)
        if pages is None:
            return False
        sequence.pages, sequence.slot = pages, self._free_slots.pop()
        sequence.prefilled, sequence.launched = sequence.prompt_length, 1
        self.running.append(sequence)
        return True

    def upcoming(self, most: int) -> tuple[int, list[int]]:
        """The slot that the next admission gets, and its first ``most`` pages or as many as are free, in order."""
        return self._free_slots[-1], self._pages.upcoming(most)

    def next_plan(self) -> Plan | None:
        """The next step to launch, counted as launched; None where there is nothing to do yet."""
        prompts = [s for s in self.running if s.finished is None and s.prefilled < s.prompt_length]
        rows = tuple(s for s in self.running if s.decoding)
        if prompts and (self._prompt_next or not rows):
            self._prompt_next = False
            return self._plan_prefill(prompts[0])
        self._prompt_next = True
        if not rows:
            return None
        for sequence in rows:
            sequence.launched += 1
        return DecodePlan(rows)

    def alone(self, sequence: Sequence) -> bool:
        """Whether nobody else runs or could run now."""
        return len(self.running) == 1 and self.running[0] is sequence and not self.admissible

    def lone(self) -> Sequence | None:
        """The sequence that alone may decode another step, nothing else being there to do; None otherwise."""
        first = self.running[0] if self.running else None
        return first if first is not None and first.decoding and self.alone(first) else None

    def plan_loop(self, sequence: Sequence, steps: int) -> LoopPlan:
        """The next up to ``steps`` tokens of the lone sequence, counted as launched."""
        count = min(steps, sequence.remaining)
        sequence.launched += count
        return LoopPlan(sequence, count)

    def recount(self, sequence: Sequence) -> None:
        """Fewer steps ran than were launched: only those whose tokens have been read count."""
        sequence.launched = len(sequence.tokens)

    @property
    def admissible(self) -> bool:
        """Whether the oldest waiting sequence could be admitted now."""
        return bool(self.waiting) and bool(self._free_slots) and self._pages.free >= self.waiting[0].pages_needed

    def _plan_prefill(self, sequence: Sequence) -> PrefillPlan:
        start = sequence.prefilled
        count = min(self._chunk, sequence.prompt_length - start)
        sequence.prefilled += count
        emit = sequence.prefilled == sequence.prompt_length
        sequence.launched += int(emit)
        return PrefillPlan(sequence, start, count, emit)

    def record(self, sequence: Sequence, token: int) -> bool:
        """Notes a token the host has read and ends the sequence where it must; False where it came too late to
        count."""
        if sequence.finished is not None:
            return False
        sequence.tokens.append(token)
        if token in sequence.stop_ids:
            self.finish(sequence, FinishReason.STOP)
        elif sequence.prompt_length + len(sequence.tokens) >= sequence.max_length:
            self.finish(sequence, FinishReason.LENGTH)
        return True

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Ends a sequence and frees its slot and pages.

        Steps in flight may still write to those pages. That is harmless: whoever gets them next writes in a later step
        of the same stream, before reading.
        """
        if sequence.finished is not None:
            return
        sequence.finished = reason
        if sequence in self.running:
            self.running.remove(sequence)
            self._free_slots.append(sequence.slot)
            self._pages.give_back(sequence.pages)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    @property
    def idle(self) -> bool:
        """Nothing running, nothing waiting."""
        return not self.running and not self.waiting
