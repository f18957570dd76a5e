"""What a request will need of the processor's caches, done now and then for nothing while nobody asks. Engine's thread.

Code that has not run for 50 ms takes three to five times as long as code that has just run, even in a thread that never
slept. So an engine that polls for its next request anyway reads one now and then, and writes an answer, to nobody.
"""

from __future__ import annotations

import time

from jitgraph.engine.service_reader import RequestReader
from jitgraph.ipc.frames import encode, engine_framer
from jitgraph.ipc.messages import Submit, Tokens, pack_ids, pack_params
from jitgraph.types import SamplingParams

EVERY_S = 2e-3
_TOKENS = 100


class Practice:
    """One service's."""

    def __init__(self, reader: RequestReader) -> None:
        self._reader = reader
        self._framer = engine_framer()
        self._frame = encode(Submit(1, pack_ids(range(_TOKENS)), pack_params(SamplingParams())))
        self._again_s = 0.0

    def now_and_then(self, now_s: float) -> None:
        """Reads a request and writes an answer, unless it has just been done."""
        if now_s < self._again_s:
            return
        self._again_s = now_s + EVERY_S
        for record in self._framer.feed(self._frame):
            if type(record) is Submit:
                self._reader.read(1, record)
        self.answer()

    @staticmethod
    def answer() -> None:
        """Writes an answer."""
        now_ns = time.perf_counter_ns()
        encode(Tokens(1, (1,), (now_ns,), (), None, 0, now_ns, now_ns))
