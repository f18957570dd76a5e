"""Who runs in the next step. Pure Python, no torch; engine's thread only.

Admission reserves every page a sequence can need (prompt and max_tokens), so a running sequence never waits for memory
and nothing is ever taken back. It is first come, first served, but that a prompt whose beginning somebody computes
right now waits for that. Prompts then take turns, a chunk each; while anybody decodes, chunks are short and a decode
step comes between any two. So the next token of whoever runs is at most one short chunk away, and the next chunk of a
prompt at most one turn of all the others.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from jitgraph.model.prefix import Chain, PrefixIndex
from jitgraph.types import FinishReason, Request, SamplingParams

MAX_NOTED_CHUNKS = 8
"""A prompt with penalties has its cached tokens noted in launches of one chunk each, all at once; the inbox holds a few
times as many, and what is over is computed."""


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
    chain: Chain = field(default_factory=list)
    """Kept pages that it holds: what its first tokens are, wherever it has them itself."""
    cached: int = 0
    """Prompt tokens that were in the cache when it was admitted."""
    prefilled: int = 0
    """Prompt tokens that were cached or whose step has been launched."""
    computed: int = 0
    """Prompt tokens that were cached or whose step is over, as far as steps without a token say."""
    launched: int = 0
    """Output tokens whose step has been launched."""
    tokens: list[int] = field(default_factory=list)
    """Output tokens the host has read."""
    finished: FinishReason | None = None
    awaits: tuple[Sequence, int] | None = None
    """Who computes what this prompt begins with too, and how many tokens of it."""

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def sorted_stop_ids(self) -> tuple[int, ...]:
        """The stop ids in one order."""
        return tuple(sorted(self.stop_ids))

    @property
    def last_at(self) -> int:
        """Output tokens with which it ends at the latest."""
        return self.max_length - self.prompt_length

    @property
    def remaining(self) -> int:
        """Output tokens whose step has not been launched."""
        return self.max_length - self.prompt_length - self.launched

    @property
    def written(self) -> int:
        """Its first tokens whose K and V are there for good, all steps that write them being over."""
        return self.prompt_length + len(self.tokens) - 1 if self.tokens else self.computed

    @property
    def begun(self) -> bool:
        """Whether its first step has been launched."""
        return self.prefilled > self.cached

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

    def reset(self) -> None: ...


class Scheduler:
    """Slots, pages and the queue."""

    def __init__(
        self,
        max_streams: int,
        chunk_tokens: int,
        pages: PageBook,
        prefixes: PrefixIndex | None = None,
        running_chunk_tokens: int | None = None,
    ) -> None:
        """``prefixes``: what is kept of the pages that ``pages`` hands out. ``running_chunk_tokens``: most prompt
        tokens of one step while anybody decodes."""
        self._chunk = chunk_tokens
        self._running_chunk = running_chunk_tokens or chunk_tokens
        self._pages = pages
        self._prefixes = prefixes
        self._slots = max_streams
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._prompts: deque[Sequence] = deque()
        """Those of ``running`` whose prompt has not been launched to its end, in the order of their turns."""
        self._start_over()

    def _start_over(self) -> None:
        self._free_slots = list(range(self._slots - 1, -1, -1))
        self.waiting.clear()
        self.running.clear()
        self._prompts.clear()
        self._prompt_next = True

    def reset(self) -> None:
        """Ends everybody as cancelled and takes all slots and pages back, wherever work broke off; no page is kept."""
        for sequence in (*self.running, *self.waiting):
            sequence.finished = sequence.finished or FinishReason.CANCELLED
        self._start_over()
        self._pages.reset()

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence; first come, first served."""
        self.waiting.append(sequence)

    def admit(self) -> Sequence | None:
        """Moves the oldest waiting sequence that does not await another's work into a free slot; None where there is
        none, or no slot, or not its pages. Slots and pages of those who came before are left for them."""
        if not self.admissible:
            return None
        needed = 0
        for ahead, sequence in enumerate(self.waiting):
            needed += sequence.pages_needed
            if ahead >= len(self._free_slots) or self._pages.free < needed:
                return None
            if self._is_being_computed(sequence):
                continue
            chain = self._find(sequence)
            if self._pages.free < needed:
                return None  # sequences that run now hold kept pages beside their own of the same tokens
            self._begin_with(sequence, chain)
            self._give_place(sequence)
            del self.waiting[ahead]
            self._prompts.append(sequence)
            return sequence
        return None

    def admit_whole(self, sequence: Sequence, chain: Chain | None = None) -> bool:
        """Admits a sequence that never waited and counts its whole prompt as launched, which fits one step; False, and
        nothing done, where anybody else is there or pages are short. ``chain``: cached pages that it begins with."""
        chain = chain or []
        if self.running or self.waiting or self._pages.free < sequence.pages_needed:
            return False
        if sequence.prompt_length - self._tokens_of(chain) > self._chunk:
            return False
        self._begin_with(sequence, chain)
        self._give_place(sequence)
        sequence.prefilled, sequence.launched = sequence.prompt_length, 1
        return True

    def _give_place(self, sequence: Sequence) -> None:
        """A slot, and the pages that are not there yet."""
        own = self._pages.take(sequence.pages_needed - len(sequence.chain))
        assert own is not None, "what is held by now was counted as free before"
        sequence.pages = [page.page for page in sequence.chain] + own
        sequence.slot = self._free_slots.pop()
        self.running.append(sequence)

    # ------------------------------------------------------------------------------------------------- cached prefixes

    def _tokens_of(self, chain: Chain) -> int:
        return len(chain) * self._prefixes.page_size if self._prefixes is not None else 0

    def reuses(self, prompt_length: int, params: SamplingParams) -> bool:
        """Whether a cached beginning is of use. With penalties its ids must be noted all the same, and a prompt up to a
        short chunk is computed as fast."""
        return not params.penalised or prompt_length > self._running_chunk

    def _find(self, sequence: Sequence) -> Chain:
        """The cached pages that a prompt begins with, those of sequences that still run included."""
        prefixes, request = self._prefixes, sequence.request
        if prefixes is None or request.prompt_logprobs is not None:
            return []  # the logits of all its tokens are wanted
        if not self.reuses(sequence.prompt_length, request.params):
            return []
        first = request.prompt_token_ids[: prefixes.page_size]
        for other in self.running:
            theirs = other.request
            if theirs.salt == request.salt and theirs.prompt_token_ids[: prefixes.page_size] == first:
                prompt = theirs.prompt_token_ids
                prefixes.extend(other.chain, theirs.salt, prompt, other.tokens, other.written, other.pages)
        chain = prefixes.match(request.salt, request.prompt_token_ids)
        most = MAX_NOTED_CHUNKS * self._chunk // prefixes.page_size if request.params.penalised else len(chain)
        return chain[:most]

    def _is_being_computed(self, sequence: Sequence) -> bool:
        """Whether somebody computes more than a short chunk of a prompt's beginning right now, so that it is sooner
        found than computed: prompts take turns, and two of a kind would take twice as long."""
        if sequence.awaits is not None:
            other, tokens = sequence.awaits
            if other.finished is None and other.written < tokens:
                return True
            sequence.awaits = None
        prefixes, request = self._prefixes, sequence.request
        if prefixes is None or request.prompt_logprobs is not None or sequence.prompt_length <= self._running_chunk:
            return False
        for other in self.running:
            if other.tokens or other.request.salt != request.salt:
                continue
            shared = prefixes.in_common(request.prompt_token_ids, other.request.prompt_token_ids)
            if shared - other.written > self._running_chunk:
                sequence.awaits = (other, shared)
                return True
        return False

    def _begin_with(self, sequence: Sequence, chain: Chain) -> None:
        """Holds the cached pages that it begins with."""
        if self._prefixes is None:
            return
        self._prefixes.hold(chain)
        sequence.chain = chain
        sequence.cached = sequence.prefilled = sequence.computed = self._tokens_of(chain)
        self._prefixes.asked_tokens += sequence.prompt_length
        self._prefixes.found_tokens += sequence.cached

    def chunk_read(self, plan: Plan) -> None:
        """A step without a token is over: what it wrote is there for good."""
        if isinstance(plan, PrefillPlan):
            plan.sequence.computed = plan.start + plan.count

    # ----------------------------------------------------------------------------------------------------------- plans

    def upcoming(self, most: int) -> tuple[int, list[int]]:
        """The slot that the next admission gets, and its first ``most`` pages or as many as are free, in order."""
        return self._free_slots[-1], self._pages.upcoming(most)

    def next_plan(self) -> Plan | None:
        """The next step to launch, counted as launched; None where there is nothing to do yet."""
        rows = tuple(s for s in self.running if s.decoding)
        if self._prompts and (self._prompt_next or not rows):
            self._prompt_next = False
            return self._plan_prefill(self._running_chunk if rows else self._chunk)
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

    def _plan_prefill(self, most: int) -> PrefillPlan:
        """The next chunk of the prompt whose turn it is."""
        sequence = self._prompts.popleft()
        start = sequence.prefilled
        count = min(most, sequence.prompt_length - start)
        sequence.prefilled += count
        emit = sequence.prefilled == sequence.prompt_length
        sequence.launched += int(emit)
        if not emit:
            self._prompts.append(sequence)
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
        """Ends a sequence and frees its slot and pages; full ones are kept for prompts that begin alike.

        Steps in flight may still write to those pages. That is harmless: whoever gets them next writes in a later step
        of the same stream, before reading. It does not reach pages that are kept: what has been read ends before it.
        """
        if sequence.finished is not None:
            return
        sequence.finished = reason
        if sequence in self.running:
            self.running.remove(sequence)
            if sequence in self._prompts:
                self._prompts.remove(sequence)
            self._free_slots.append(sequence.slot)
            if self._prefixes is None:
                self._pages.give_back(sequence.pages)
            else:
                request, written = sequence.request, sequence.written
                prompt, output = request.prompt_token_ids, sequence.tokens
                self._prefixes.end(request.salt, prompt, output, written, sequence.pages, sequence.chain)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    @property
    def overdue(self) -> bool:
        """Whether ``expire`` has anything to do; next to nothing while nobody waits."""
        return bool(self.waiting) and bool(self._late())

    def expire(self) -> list[Sequence]:
        """Ends as cancelled whoever still waits past its deadline; returns them."""
        late = self._late() if self.waiting else []
        for sequence in late:
            self.finish(sequence, FinishReason.CANCELLED)
        return late

    def _late(self) -> list[Sequence]:
        now = time.monotonic()
        return [s for s in self.waiting if s.request.deadline_s is not None and s.request.deadline_s <= now]

    @property
    def idle(self) -> bool:
        """Nothing running, nothing waiting."""
        return not self.running and not self.waiting
