"""How much of everything is measured: the full counts, and the few of a quick run. Plain values, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from jitgraph.bench.plan import DEFAULT_LENGTHS, PAUSE_S


@dataclass(frozen=True)
class Scale:
    """Counts of a run. The defaults are those of a run of record."""

    pause_s: float = PAUSE_S
    """Before each request, and before each replay that a figure is divided by."""
    lengths: tuple[int, ...] = DEFAULT_LENGTHS
    ttft_requests: int = 30
    """At each length, and as many replays of the matrix products."""
    decode_rounds: int = 5
    decode_spans: tuple[tuple[int, int], ...] = ((10, 91), (100, 151), (250, 251), (500, 65))
    """(prompt, tokens): together the contexts from 10 to 564, each once."""
    tail_requests: int = 1000
    tail_prompt: int = 100
    itl_streams: int = 100
    itl_prompt: int = 400
    """Where a stream begins; up to its end attention splits the context in the same number of parts."""
    itl_tokens: int = 101
    """As many as a pause between streams lets the card's power recover from: streams of 400 reach its limit, and then
    the tail is that of the clock."""
    capture_rounds: int = 6
    capture_graphs: int = 50
    """Graphs captured beside one stream."""
    capture_prompt: int = 256
    capture_tokens: int = 400
    """So long that even a slow host has made all the graphs before the end; gaps after the last are left out."""
    unseen_lengths: int = 50
    unseen_repeats: int = 3
    isolated_requests: int = 15
    """At each length, through another process and in this one."""
    sweep_lengths: tuple[int, ...] = tuple(range(1, 513))
    """Prompt lengths that each kind of sampling is asked at, spread over the batch sizes."""
    sweep_batches: tuple[int, ...] = tuple(range(1, 9))
    soak_cycles: int = 10_000
    soak_begin: int = 500
    """Cycles after which growth is counted."""
    soak_every: int = 100
    """Cycles between two looks at memory."""
    ready_warm: int = 2
    host_tokens: int = 640
    long_prompt: int = 4096
    long_repeats: int = 5
    window: int = 2048
    window_tokens: int = 20_000
    window_block: int = 100
    """Tokens that one sample of the long stream averages over."""
    invariant_lengths: tuple[int, ...] = (10, 100, 300, 500)
    invariant_requests: int = 12
    invariant_tokens: int = 257


FULL = Scale()
QUICK = Scale(
    pause_s=0.002,
    ttft_requests=2,
    decode_rounds=1,
    decode_spans=((10, 9), (100, 9), (250, 9), (500, 9)),
    tail_requests=10,
    itl_streams=2,
    itl_tokens=31,
    capture_rounds=2,
    capture_graphs=5,
    capture_prompt=32,
    capture_tokens=90,
    unseen_lengths=4,
    unseen_repeats=1,
    isolated_requests=1,
    sweep_lengths=(1, 2, 7, 16, 33, 50),
    sweep_batches=(1, 3),
    soak_cycles=200,
    soak_begin=50,
    soak_every=25,
    ready_warm=1,
    host_tokens=64,
    long_prompt=1200,
    long_repeats=1,
    window=64,
    window_tokens=150,
    window_block=50,
    invariant_lengths=(10, 100),
    invariant_requests=2,
    invariant_tokens=9,
)
"""That everything runs, in well under a minute on a CPU: no figure of it means anything."""
