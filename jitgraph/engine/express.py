"""The shortest way of a prompt to an idle GPU.

Engine's thread. Code that has not run for a while is slow: its instructions and data have left the caches. So what can
be known before a request is prepared while nobody waits (``arm``), and ``fire`` only checks the prompt, fills in what
is new and launches. The engine's books are kept afterwards, beside the working GPU. What ``fire`` does not take goes
the ordinary way, with the same result; it changes nothing then.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jitgraph.engine.intake import Intake
from jitgraph.engine.runner import CHUNK, Runner
from jitgraph.engine.scheduler import Scheduler
from jitgraph.engine.sizing import Sizing
from jitgraph.graphs.dispatch import Decision
from jitgraph.graphs.key import GraphKey
from jitgraph.model.prefix import Chain, PrefixIndex
from jitgraph.ops.inbox import HEADER
from jitgraph.ops.slots import BLOCK_TABLE, SCALARS, STOP_IDS
from jitgraph.types import MAX_STOP_TOKEN_IDS, SamplingParams

_REHEARSED = SamplingParams(seed=0)


@dataclass(frozen=True)
class Shot:
    """A prompt's step that has been launched and is to be booked."""

    wanted: GraphKey
    decision: Decision
    chain: Chain | None = None
    """Cached pages that the prompt begins with."""


@dataclass(frozen=True)
class _Way:
    """How prompts of one length run, as long as the store has the same graphs."""

    generation: int
    replay: Callable[[], None]
    shot: Shot


class Express:
    """One engine's shortest way."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        sizing: Sizing,
        vocabulary: int,
        intake: Intake,
        prefixes: PrefixIndex | None = None,
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._sizing = sizing
        self._vocabulary = vocabulary
        self._prefixes = prefixes
        self._eos = array("i", sorted(intake.eos))
        self._seed = intake.seed
        self._usable = runner.has_ways and len(intake.eos) <= MAX_STOP_TOKEN_IDS
        self._ways: dict[int, _Way] = {}
        self._row = -1
        self._slot = -1
        self._pages = 0
        self._upcoming = array("i")
        self._zeros = bytes(4 * sizing.pages_per_slot)
        self.unbooked = False
        """A prompt was fired that is not in the books yet; where an interrupt came between, it never will be."""

    @property
    def armed(self) -> bool:
        """Whether the next prompt can be fired."""
        return self._row >= 0

    @property
    def usable(self) -> bool:
        """Whether there is such a way on this engine at all."""
        return self._usable

    def arm(self) -> None:
        """Prepares the row of the inbox for the next prompt. Only while nothing runs, waits or is in flight."""
        assert self._usable and not self._scheduler.running and not self._scheduler.waiting
        slot, pages = self._scheduler.upcoming(self._sizing.pages_per_slot)
        row = self._runner.next_row()
        table, inbox = row + 4 * (HEADER + BLOCK_TABLE), self._runner.inbox
        words = array("i", pages)
        inbox[table : table + 4 * len(words)] = memoryview(words).cast("B")
        stops = row + 4 * (HEADER + STOP_IDS)
        inbox[stops : stops + 4 * len(self._eos)] = memoryview(self._eos).cast("B")
        self._slot, self._pages, self._upcoming, self._row = slot, len(pages), words, row

    def disarm(self) -> None:
        """Something else goes first: slot, pages or row may be taken by it."""
        self._row = -1
        self.unbooked = False

    def fire(self, ids: Sequence[int], params: SamplingParams, salt: str = "") -> Shot | None:
        """Launches the whole prompt, or what the cache has not of it, as one step; None, with nothing done, where it
        must go the ordinary way."""
        found = self._prepare(ids, params, salt)
        if found is None:
            return None
        way, chain = found
        self._row, self.unbooked = -1, True
        way.replay()
        return Shot(way.shot.wanted, way.shot.decision, chain) if chain else way.shot

    def rehearse(self) -> None:
        """Does all of ``fire`` but the launch, for a prompt as long as one that came before, so that the processor has
        it at hand; nothing comes of it. Only while nothing runs."""
        row, count = self._row, next(reversed(self._ways), 0)
        if row < 0 or not count or self._ways[count].generation != self._runner.generation:
            return
        self._prepare((0,) * count, _REHEARSED, "")
        table, words = row + 4 * (HEADER + BLOCK_TABLE), self._upcoming  # shorter prompts leave the rest of it empty
        self._runner.inbox[table : table + 4 * len(words)] = memoryview(words).cast("B")

    def _prepare(self, ids: Sequence[int], params: SamplingParams, salt: str) -> tuple[_Way, Chain | None] | None:
        """The checks, and the inbox's row; None where the prompt must go the ordinary way."""
        row, count = self._row, len(ids)
        if row < 0 or params.stop_token_ids or params.logit_bias or set(map(type, ids)) != {int}:
            return None
        try:
            words = array("i", ids)
        except OverflowError:
            return None
        sizing = self._sizing
        chain = self._prefixes.match(salt, words) if self._prefixes is not None else None
        if chain and params.penalised:
            if self._scheduler.reuses(count, params):
                return None  # the slot's history must be told of the cached tokens first
            chain = None
        start = len(chain) * sizing.page_size if chain else 0
        way = self._ways.get(count - start)
        if way is None or way.generation != self._runner.generation:
            way = self._find(count - start)
            if way is None:
                return None
        most = min(count + params.max_tokens, sizing.max_model_len)
        pages = sizing.pages_for(most)
        if start:
            words = words[start:]  # those before are known
        if max(words) >= self._vocabulary or min(words) < 0 or count >= sizing.max_model_len or pages > self._pages:
            return None
        table = row + 4 * (HEADER + BLOCK_TABLE)
        if chain:
            self._lay(table, chain, pages)
        inbox, seed = self._runner.inbox, self._seed(params)
        CHUNK.pack_into(inbox, row, 1, self._slot, start, count - start, 1)
        SCALARS.pack_into(
            inbox,
            row + 4 * HEADER,
            *(0, 0, 0, count),
            min(count + params.min_tokens, most),
            most,
            *params.kernel_ints,
            *((seed + 2**31 & 0xFFFFFFFF) - 2**31, (seed >> 32) - ((seed >> 63) << 32)),
            0 if params.ignore_eos else len(self._eos),
            *params.kernel_floats,
            params.penalised,
            0,
        )
        inbox[table + 4 * pages : table + 4 * self._pages] = self._zeros[: 4 * (self._pages - pages)]
        first = row + self._runner.prompt_offset
        inbox[first : first + 4 * len(words)] = memoryview(words).cast("B")
        return way, chain

    def _lay(self, table: int, chain: Chain, pages: int) -> None:
        """Writes a block table that begins with cached pages at byte ``table``. Those that follow are what will be
        taken then: pages that are held are not among those to come."""
        cached = [page.page for page in chain]
        held = set(cached)
        own = [page for page in self._upcoming[:pages] if page not in held][: pages - len(cached)]
        words = array("i", cached + own)
        self._runner.inbox[table : table + 4 * pages] = memoryview(words).cast("B")

    def _find(self, count: int) -> _Way | None:
        """The way of a length, kept until the store's graphs change."""
        if not 0 < count <= self._sizing.chunk_tokens:
            return None
        found = self._runner.way(count)
        if found is None:
            return None
        wanted, decision, replay = found
        way = self._ways[count] = _Way(self._runner.generation, replay, Shot(wanted, decision))
        return way
