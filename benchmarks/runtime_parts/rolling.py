"""Parts *capturing* and *unseen*: what the rolling store costs those who wait, and how soon a new length is as fast as
any other."""

from __future__ import annotations

import random
import time
from itertools import pairwise

from jitgraph import LLM, SamplingParams
from runtime_parts import inside
from runtime_parts.lab import BUCKETS, Lab, Result

LENGTHS_SEED = 20260423
GRAPHS_AT_START = 2 * 8 + len(BUCKETS)
"""Decode graphs of both kinds for eight streams, and the buckets."""


def random_lengths(count: int, most: int) -> list[int]:
    """So many different prompt lengths up to ``most`` that are no bucket, always the same ones."""
    return random.Random(LENGTHS_SEED).sample([n for n in range(1, most + 1) if n not in BUCKETS], count)


def capturing(lab: Lab) -> Result:
    """Streams beside which graphs are captured, and streams beside which nothing happens, in turns.

    The graphs are of lengths that the engine ran before it was ready but had no room for: what has never run is not
    captured beside running steps. One stream after another then finds room made for so many of them.
    """
    scale = lab.scale
    lengths = sorted(random_lengths(scale.capture_rounds * scale.capture_graphs, BUCKETS[-1]))
    llm = lab.llm(precapture_lengths=lengths, max_graphs=GRAPHS_AT_START, graph_memory="4GiB")
    inside.reserve(llm, len(lengths))
    prompt = lab.ids(scale.capture_prompt)
    lab.warm(llm, prompt)
    samples: dict[str, list[list[float]]] = {"gaps_capturing": [], "gaps_idle": [], "captures": []}
    count = lab.counting("streams", 2 * scale.capture_rounds)
    llm.reset_stats()
    for index in range(scale.capture_rounds):
        wanted = lengths[index * scale.capture_graphs : (index + 1) * scale.capture_graphs]
        for name, lengths_now in (("gaps_capturing", wanted), ("gaps_idle", [])):
            lab.pause()
            gaps, made = _stream(lab, llm, prompt, lengths_now)
            samples[name].append(gaps)
            if lengths_now:
                samples["captures"].append([float(one) for one in made])
                llm.settle()
            count.step()
    stats = llm.stats()
    return Result(
        samples=samples,
        counters={name: stats[name] for name in ("captures", "captures_abandoned", "capture_failures", "decode_paths")},
        conditions={"graphs_per_stream": scale.capture_graphs, "prompt_tokens": scale.capture_prompt},
    )


def _stream(lab: Lab, llm: LLM, prompt: list[int], wanted: list[int]) -> tuple[list[float], list[int]]:
    """One stream's gaps, and how many captures were done at each of its tokens since it began."""
    counters = inside.store(llm).counters
    params = SamplingParams(max_tokens=lab.scale.capture_tokens, ignore_eos=True)
    times, made = [], []
    before = counters.captures
    inside.make_room(llm, wanted)
    for _ in llm.stream(prompt, params):
        times.append(time.perf_counter_ns())
        made.append(counters.captures - before)
        if not lab.cuda:
            inside.capture_piece(llm)
    return [(b - a) / 1e6 for a, b in pairwise(times)], made


def unseen(lab: Lab) -> Result:
    """Lengths that the engine has never seen: the first request of each, and some more once its graph is there."""
    scale = lab.scale
    lengths = random_lengths(scale.unseen_lengths, BUCKETS[-1])
    llm = lab.llm(max_graphs=GRAPHS_AT_START + len(lengths))
    lab.warm(llm, lab.ids(BUCKETS[-1]))
    first: dict[str, float] = {}
    later: dict[str, list[float]] = {}
    paths = {"first": dict[str, int](), "later": dict[str, int]()}
    count = lab.counting("lengths", len(lengths))
    for length in lengths:
        prompt = lab.ids(length)
        llm.reset_stats()
        lab.pause()
        first[str(length)] = lab.first_token_ms(llm, prompt)
        _add(paths["first"], llm)
        settled = llm.settle()
        assert settled, "the engine did not come to rest within a minute"
        llm.reset_stats()
        later[str(length)] = []
        for _ in range(scale.unseen_repeats):
            lab.pause()
            later[str(length)].append(lab.first_token_ms(llm, prompt))
        _add(paths["later"], llm)
        count.step()
    return Result(
        samples={"first": first, "exact": later},
        counters=paths,
        conditions={"repeats": scale.unseen_repeats, "max_graphs": GRAPHS_AT_START + len(lengths)},
    )


def _add(paths: dict[str, int], llm: LLM) -> None:
    for path, count in llm.stats()["prefill_paths"].items():
        paths[path] = paths.get(path, 0) + count
