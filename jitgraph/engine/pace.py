"""When the next token is due: the engine's sense of how long its steps take. Pure, no torch.

Engine's thread. It serves one purpose: work in the shadow of the GPU must end before the token does.
"""

from __future__ import annotations

from jitgraph.graphs.key import GraphKey, Phase

MARGIN_S = 150e-6
"""Time kept free before a token is due."""
_WEIGHT = 0.1


class Pace:
    """Gaps between consecutive steps of one key, smoothed downwards faster than upwards.

    Decoding alone: a prompt's step follows the one before whenever its request happens to come.
    """

    def __init__(self) -> None:
        self._gap_s: dict[GraphKey, float] = {}
        self._last_step = -1
        self._last_s = 0.0

    def note(self, key: GraphKey, step: int, now_ns: int) -> None:
        """Step number ``step`` was read at ``now_ns`` (``time.perf_counter_ns``)."""
        now = now_ns / 1e9
        if step == self._last_step + 1 and key.phase is Phase.DECODE:
            gap, known = now - self._last_s, self._gap_s.get(key)
            if known is None or gap < known:
                self._gap_s[key] = gap if known is None else (known + gap) / 2
            else:
                self._gap_s[key] = known + _WEIGHT * (min(gap, 2 * known) - known)
        self._last_step, self._last_s = step, now

    def due(self, key: GraphKey, step: int) -> float | None:
        """Until when (``time.perf_counter`` seconds) other work may run before this step's token; None where nobody
        can say."""
        gap = self._gap_s.get(key)
        if gap is None or step != self._last_step + 1:
            return None
        return self._last_s + gap - MARGIN_S
