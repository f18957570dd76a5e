"""One engine in a process of its own: says when it was ready and answers one request. Run by ``ready.py``."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def main() -> int:
    """Process entry: the request as JSON in the only argument, the report as JSON in the last line of the output."""
    request = json.loads(sys.argv[1])
    started_s = request.pop("started_s")
    from jitgraph import LLM, SamplingParams

    with LLM(**request) as llm:
        took_s = time.time() - started_s
        phases = llm.stats()["ready_ms"]
        begin = time.perf_counter()
        next(llm.stream(list(range(10, 110)), SamplingParams(max_tokens=1, ignore_eos=True)))
        first_ms = (time.perf_counter() - begin) * 1e3
        report = {
            "ready_s": took_s - phases["load"] / 1e3,
            "phases_ms": phases,
            "first_request_ms": first_ms,
            "compiled": llm._engine.ready.compiled,
            "compiles_after_ready": llm.stats()["compiles_after_ready"],
        }
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
