"""Graph keys and bucket functions: everything a captured graph bakes in, as plain values. Pure, no torch."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class Phase(str, enum.Enum):
    """What a step does."""

    PREFILL = "prefill"
    """A chunk of one prompt: T tokens, one row that gets a token."""
    DECODE = "decode"
    """One token of each of T rows."""


class Sampling(str, enum.Enum):
    """Which sampling a step's graph contains."""

    GREEDY = "greedy"
    """Argmax alone."""
    FULL = "full"
    """Everything ``SamplingParams`` can ask for, read from the slot table."""
    OUTSIDE = "outside"
    """None: the graph ends with the logits and sampling runs eagerly after it."""


@dataclass(frozen=True)
class GraphKey:
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
    for candidate in sizes:
        if candidate >= size:
            return candidate
    return None


def precapture_keys(
    max_streams: int, buckets: Iterable[int], exact: Iterable[int], fused: bool, limit: int
) -> tuple[list[GraphKey], list[GraphKey]]:
    """Graphs to capture at start, most useful first, and those that ``limit`` leaves out.

    Decode of every batch size first (each token needs it), then greedy prompts (buckets, then exact lengths), then
    sampled prompts. With sampling outside, greedy and sampled requests share a graph.
    """
    kinds = [Sampling.GREEDY, Sampling.FULL] if fused else [Sampling.OUTSIDE]
    keys = [GraphKey(Phase.DECODE, rows, kind) for kind in kinds for rows in range(1, max_streams + 1)]
    bucket_list = list(buckets)
    lengths = bucket_list + [n for n in dict.fromkeys(exact) if n not in bucket_list]
    keys += [GraphKey(Phase.PREFILL, n, kind) for kind in kinds for n in lengths]
    return keys[:limit], keys[limit:]
