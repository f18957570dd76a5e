"""An engine process whose steps take long: ``python tests/slow_engine.py --socket PATH --step-s S --longest-s L``.

The real service over the engine that counts. A prompt that begins with ``HANG_ID`` never gets its step done.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from service_cases import FACTS, Counting

from jitgraph.engine.service import Service, ServiceOptions
from jitgraph.engine.service_hub import Hub
from jitgraph.ipc.listener import Listener
from jitgraph.ipc.messages import EngineFacts, Ready
from jitgraph.types import TokenChunk

HANG_ID = 13


class Slow(Counting):
    """Sleeps in each step."""

    step_s = 0.0

    def step(self) -> list[TokenChunk]:
        hangs = any(request.prompt_token_ids[0] == HANG_ID for request, _ in self.running.values())
        time.sleep(1e6 if hangs else self.step_s)
        return super().step()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--step-s", type=float, required=True)
    parser.add_argument("--longest-s", type=float, required=True)
    options = parser.parse_args()
    engine = Slow()
    engine.step_s = options.step_s
    facts = {name: getattr(FACTS, name) for name in FACTS.__struct_fields__}
    ready = Ready(EngineFacts(**{**facts, "pid": os.getpid()}), {"load": 0.0}, {})
    hub = Hub(Listener(options.socket))
    service = Service(engine, engine, hub, ready, ServiceOptions(longest_s=options.longest_s))
    signal.signal(signal.SIGTERM, lambda number, frame: service.drain(0.0))
    service.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
