"""Graph keys and bucket functions: everything a captured graph bakes in, as plain values. Pure, no torch."""

from __future__ import annotations

import enum
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Phase(str, enum.Enum):
    """What a step does."""

    __hash__ = str.__hash__  # keys are looked up for each step; the hash of an enum takes a call of Python

    PREFILL = "prefill"
    """A chunk of one prompt: T tokens, one row that gets a token."""
    DECODE = "decode"
    """One token of each of T rows."""


class Sampling(str, enum.Enum):
    """Which sampling a step's graph contains."""

    __hash__ = str.__hash__  # keys are looked up for each step; the hash of an enum takes a call of Python

    GREEDY = "greedy"
    """Argmax alone."""
    FULL = "full"
    """Everything ``SamplingParams`` can ask for, read from the slot table."""
    OUTSIDE = "outside"
    """None: the graph ends with the logits and sampling runs eagerly after it."""


class Path(str, enum.Enum):
    """How a step runs: the rungs of the ladder, best first."""

    __hash__ = str.__hash__  # keys are looked up for each step; the hash of an enum takes a call of Python

    EXACT = "exact"
    """A graph of this very size is replayed."""
    PADDED = "padded"
    """A larger graph is replayed; dummy rows fill it."""
    EAGER = "eager"
    """Its kernels are launched one by one."""
    LOOP = "loop"
    """The device repeats the graph of a lone stream by itself; beside the ladder, for decoding alone."""


class GraphKey(NamedTuple):
    """All that is baked into a graph: two steps with the same key replay the same graph."""

    phase: Phase
    tokens: int
    """T, padding included; a decode step has as many rows."""
    sampling: Sampling

    @property
    def rows(self) -> int:
        """R: rows that get a token."""
        return self.tokens if self.phase is Phase.DECODE else 1

    def __str__(self) -> str:
        return f"{self.phase.value}/{self.tokens}/{self.sampling.value}"


def smallest_at_least(size: int, sizes: Sequence[int]) -> int | None:
    """The smallest of the ascending ``sizes`` that holds ``size``, or None where none does."""
    index = bisect_left(sizes, size)
    return sizes[index] if index < len(sizes) else None


def prompt_sampling(fused: bool) -> Sampling:
    """The one kind of sampling in the graphs of prompts.

    A prompt needs one token, so a graph that can do everything costs it next to nothing, and half as many graphs
    serve all prompts.
    """
    return Sampling.FULL if fused else Sampling.OUTSIDE


def precapture_keys(
    max_streams: int, buckets: Iterable[int], exact: Iterable[int], fused: bool, limit: int
) -> tuple[list[GraphKey], list[GraphKey]]:
    """Graphs to capture at start, most useful first, and those that ``limit`` leaves out.

    Decoding of every batch size first (each token needs it), greedy before sampled; then the prompt buckets, which
    serve every length; then the ``exact`` lengths in the order given. With sampling outside, decoding has one kind.
    """
    kinds = (Sampling.GREEDY, Sampling.FULL) if fused else (Sampling.OUTSIDE,)
    keys = [GraphKey(Phase.DECODE, rows, kind) for kind in kinds for rows in range(1, max_streams + 1)]
    keys += [GraphKey(Phase.PREFILL, n, prompt_sampling(fused)) for n in dict.fromkeys([*buckets, *exact])]
    return keys[:limit], keys[limit:]
