"""What a cached conversation costs: ``python benchmarks/prefix.py [--model M] [--device D] [--output FILE]``.

A conversation of 2,000 tokens (a prompt and its answer of 64) is served once; then its next turn of 20 tokens is asked
for again and again, each time with other tokens. TTFT of that is compared with TTFT of a prompt of 20 tokens, and with
that of a prompt as long as both together that begins like no other. The three take turns, with a pause before each.
One process, batch 1; TTFT is from handing over the ids to the first id on the host.

On a GPU the turn may take at most 1.3 times the short prompt, and the command ends with 1 where it takes more. On a CPU
the figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

LIMIT = 1.3
ANSWER = 64
"""Generated tokens at the end of the conversation."""
PAUSE_S = 0.05
WARM_UP = 5
"""Rounds that do not count."""
SHORT, TURN, COMPUTED = "short prompt", "next turn, cached", "next turn, computed"


def main(arguments: list[str] | None = None) -> int:
    """Command entry; works without an installed package."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    options = _options(arguments)
    found = measure(options)
    for line in table(found):
        print(line)
    if options.output:
        Path(options.output).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if found["holds"] is not False else 1


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="TTFT of the next turn of a cached conversation.")
    parser.add_argument("--model", default="llama-2-7b", help="checkpoint folder, hub id or preset")
    parser.add_argument("--weights", default="random", choices=("random", "checkpoint"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--context", type=int, default=2000, help="tokens of the conversation, its answer included")
    parser.add_argument("--turn", type=int, default=20, help="tokens of the next turn, and of the short prompt")
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--output", help="file for the raw figures (JSON)")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All samples, their summaries, and whether the floor holds (None on a CPU)."""
    from jitgraph import LLM, SamplingParams
    from jitgraph.bench.environment import collect_environment
    from jitgraph.bench.stats import summarise

    source = random.Random(0)
    samples: dict[str, list[float]] = {SHORT: [], TURN: [], COMPUTED: []}
    cached: dict[str, set[int]] = {name: set() for name in samples}
    settings = {"weights": options.weights, "device": options.device, "dtype": options.dtype}
    length = options.context + options.turn
    with LLM(options.model, **settings) as llm:

        def fresh(count: int) -> list[int]:
            return [source.randrange(llm.spec.vocab_size) for _ in range(count)]

        def ttft(ids: list[int]) -> tuple[float, int]:
            """Milliseconds, and how many of the tokens were cached."""
            time.sleep(PAUSE_S)
            started = time.perf_counter_ns()
            with llm.stream(ids, SamplingParams(max_tokens=1, ignore_eos=True)) as stream:
                next(stream)
                return (time.perf_counter_ns() - started) / 1e6, stream.cached_tokens

        said = fresh(options.context - ANSWER)
        answer = llm.generate([said], SamplingParams(max_tokens=ANSWER, ignore_eos=True))[0]
        conversation = [*said, *answer.token_ids]
        for turn in range(WARM_UP + options.iterations):
            prompts = {
                SHORT: fresh(options.turn),
                TURN: conversation + fresh(options.turn),
                COMPUTED: fresh(length),
            }
            if turn == WARM_UP:
                llm.settle()
            for name, ids in prompts.items():
                taken, hit = ttft(ids)
                if turn >= WARM_UP:
                    samples[name].append(taken)
                    cached[name].add(hit)
        about, environment = llm.describe(), collect_environment(str(llm.device))
    rows = {name: asdict(summarise(values)) for name, values in samples.items()}
    ratio = rows[TURN]["mean"] / rows[SHORT]["mean"]
    return {
        "environment": environment,
        "engine": about,
        "context_tokens": options.context,
        "turn_tokens": options.turn,
        "cached_tokens": {name: sorted(values) for name, values in cached.items()},
        "ttft_ms": rows,
        "ratio": ratio,
        "limit": LIMIT,
        "holds": None if about["emulated"] else ratio <= LIMIT,
        "samples_ms": samples,
    }


def table(found: dict[str, Any]) -> list[str]:
    """The figures in a few lines."""
    lines = [f"{'':22}{'TTFT ms':>9}{'std':>8}{'P50':>9}{'P99':>9}  cached tokens"]
    for name, row in found["ttft_ms"].items():
        hits = ", ".join(map(str, found["cached_tokens"][name]))
        lines.append(f"{name:22}{row['mean']:9.3f}{row['std']:8.3f}{row['p50']:9.3f}{row['p99']:9.3f}  {hits}")
    verdict = {None: "emulated: it means nothing", True: "holds", False: "missed"}[found["holds"]]
    lines.append(f"next turn / short prompt = {found['ratio']:.2f} (at most {found['limit']:.2f}: {verdict})")
    return lines


if __name__ == "__main__":
    sys.exit(main())
