"""For how long a thread that waits for another process polls before it sleeps. No torch.

To be woken takes a sleeping thread some 50 to 200 us, in a virtual machine most of all; to find something by polling
takes one. A core is busy meanwhile, so this is for machines that have cores to spare and a GPU that does the work.
"""

from __future__ import annotations

import os

BETWEEN_REQUESTS_S = 1.0
"""An engine's: whoever is in the midst of something asks again within a second; who reads an answer takes longer."""
FOR_AN_ANSWER_S = 0.02
"""A client's: longer than a token takes, and than most first tokens."""
_CORES = 4
"""Two that poll, one that serves, and one for everything else."""


def polling_s(wanted_s: float | None, device: str, usual_s: float) -> float:
    """Seconds to poll: what is wanted; where nothing is, ``usual_s`` beside a GPU and enough cores, else none."""
    if wanted_s is not None:
        return wanted_s
    return usual_s if device.startswith("cuda") and len(os.sched_getaffinity(0)) >= _CORES else 0.0
