"""Code completion, with the time to the first token of each: ``python examples/complete.py [MODEL]``.

An editor asks again at every pause, and most of its prompt is what it sent before. The engine keeps what it has
computed, so only the new end of the prompt costs time.
"""

from __future__ import annotations

import sys
import time

from jitgraph import LLM, SamplingParams

FILE = "import json\nfrom pathlib import Path\n\n\nclass Settings:\n    def __init__(self, path):\n"
TYPED = ("        self.path = ", "Path(path)\n\n    def load(self):\n", "        with open(", "self.path) as f:\n")

with LLM(*sys.argv[1:]) as llm:
    text = FILE
    for piece in TYPED:
        text += piece
        started = time.perf_counter_ns()
        with llm.stream(text, SamplingParams(max_tokens=24, stop=("\n",))) as stream:
            chunks = list(stream)
        ttft_ms = (chunks[0].time_ns - started) / 1e6
        last = text.splitlines()[-1] if not text.endswith("\n") else ""
        completion = "".join(chunk.text for chunk in chunks)
        print(f"TTFT {ttft_ms:6.1f} ms, {stream.cached_tokens:3} tokens known  |{last}[{completion}]")
