"""Text as it comes: ``python examples/stream.py [PROMPT [MODEL]]``."""

from __future__ import annotations

import sys

from jitgraph import LLM, SamplingParams

prompt, *model = sys.argv[1:] or ["def read_json(path):"]

with LLM(*model) as llm:
    print(prompt, end="", flush=True)
    for chunk in llm.stream(prompt, SamplingParams(max_tokens=96, temperature=0.4, top_p=0.95, seed=1)):
        print(chunk.text, end="", flush=True)
    print()
