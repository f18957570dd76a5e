"""Eight prompts at once: ``python examples/batch.py [MODEL]``. They share steps: each step answers all of them."""

from __future__ import annotations

import sys
import time

from jitgraph import LLM, SamplingParams

NAMES = ("add", "is_prime", "read_lines", "count_words", "merge", "flatten", "now", "main")

with LLM(*sys.argv[1:], max_streams=8) as llm:
    params = SamplingParams(max_tokens=32, ignore_eos=True)
    started = time.perf_counter()
    outputs = llm.generate([f"def {name}(" for name in NAMES], params)
    elapsed = time.perf_counter() - started
    for name, output in zip(NAMES, outputs, strict=True):
        line = output.text.splitlines()[0] if output.text.strip() else ""
        print(f"def {name}({line}  # first token after {output.timings.ttft_ms:.0f} ms")
    tokens = sum(len(output.token_ids) for output in outputs)
    print(f"{tokens} tokens in {elapsed:.2f} s: {tokens / elapsed:.0f} a second")
