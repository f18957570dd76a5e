"""Parts *window* and *invariant*: prompts and streams longer than anything captured, and what bits that do not depend
on the batch cost."""

from __future__ import annotations

import time
from typing import Any

from jitgraph import LLM, SamplingParams
from runtime_parts import inside
from runtime_parts.lab import Lab, Result

STREAM_PROMPT = 128


def window(lab: Lab) -> Result:
    """A long prompt in chunks; then one stream far longer than its KV window. No graph may come or grow meanwhile."""
    scale = lab.scale
    limit = lab.source.spec.max_position_embeddings
    length = min(scale.long_prompt, limit)
    llm = lab.llm(kv_window=limit, max_streams=1)
    prompt, times = lab.ids(length), []
    lab.first_token_ms(llm, prompt)
    for _ in range(scale.long_repeats):
        lab.pause()
        times.append(lab.first_token_ms(llm, prompt))
    lab.say(f"  {length} tokens of prompt: {min(times):.1f} ms")
    llm = lab.llm(kv_window=scale.window, max_streams=1)
    lab.warm(llm, lab.ids(STREAM_PROMPT))
    llm.settle()
    blocks, counters = _long_stream(lab, llm)
    stats = llm.stats()
    return Result(
        samples={"long_prompt": times, "blocks": blocks},
        counters={**counters, "decode_paths": stats["decode_paths"], "captures": stats["captures"]},
        conditions={"long_prompt_tokens": length, "kv_window": scale.window, "tokens_per_sample": scale.window_block},
    )


def _long_stream(lab: Lab, llm: LLM) -> tuple[list[float], dict[str, int]]:
    """Milliseconds a token, averaged over blocks, and what graphs and device held before and after."""
    scale, budget = lab.scale, inside.store(llm).budget
    count = lab.counting("tokens", scale.window_tokens)
    before, used = budget.nbytes, lab.used_bytes()
    params = SamplingParams(max_tokens=scale.window_tokens, ignore_eos=True)
    blocks: list[float] = []
    tokens, begin = 0, 0.0
    for _ in llm.stream(lab.ids(STREAM_PROMPT), params):
        if tokens % scale.window_block == 0:
            now = time.perf_counter()
            if tokens:
                blocks.append((now - begin) / scale.window_block * 1e3)
                count.step(scale.window_block)
            begin = now
        tokens += 1
    counters = {"stream_tokens": tokens, "graph_bytes_before": before, "graph_bytes_after": budget.nbytes}
    return blocks, {**counters, "used_bytes_before": used, "used_bytes_after": lab.used_bytes()}


def invariant(lab: Lab) -> Result:
    """Two engines side by side, one in the batch-invariant mode, in turns at each length."""
    scale = lab.scale
    lab.close()
    exact = tuple(n for n in scale.invariant_lengths if n in lab.exact_lengths)
    settings: dict[str, Any] = {"precapture_lengths": exact, "max_streams": 1}
    ttft: dict[str, dict[str, list[float]]] = {"on": {}, "off": {}}
    gaps: dict[str, list[list[float]]] = {"on": [], "off": []}
    count = lab.counting("requests", len(scale.invariant_lengths) * scale.invariant_requests)
    with lab.another(batch_invariant=True, **settings) as on, lab.another(**settings) as off:
        engines = {"on": on, "off": off}
        for length in scale.invariant_lengths:
            prompt = lab.ids(length)
            for name, llm in engines.items():
                lab.warm(llm, prompt, tokens=1)
                ttft[name][str(length)] = []
            for _ in range(scale.invariant_requests):
                for name, llm in engines.items():
                    lab.pause()
                    ttft[name][str(length)].append(lab.first_token_ms(llm, prompt))
                count.step()
        prompt = lab.ids(scale.invariant_lengths[0])
        for _ in range(2):
            for name, llm in engines.items():
                lab.pause()
                gaps[name].append(lab.token_gaps_ms(llm, prompt, scale.invariant_tokens))
    conditions = {"requests": scale.invariant_requests, "decode_tokens": scale.invariant_tokens}
    return Result({name: {"ttft": ttft[name], "gaps": gaps[name]} for name in engines}, conditions=conditions)
