"""The token ring's layout: how a step hands its tokens to the host through mapped memory.

``ring[step % depth, row]`` is one row's record of ``RING_FIELDS`` int64 words. The device writes it inside the step;
the host polls it and never synchronises.
"""

from __future__ import annotations

from jitgraph.types import MAX_LOGPROBS

RING_TOKEN = 0
RING_LOGPROB = 1
RING_TOP_IDS = 2
RING_TOP_LOGPROBS = RING_TOP_IDS + MAX_LOGPROBS
RING_FIELDS = RING_TOP_LOGPROBS + MAX_LOGPROBS
"""int64 words of one row's record in the token ring. Each word carries the low 32 bits of the step's number in its
upper half and its payload (an id, or the bits of a float32) in its lower half, so a reader needs no fence: it waits
until every word it wants carries the step it waits for."""
