"""How many threads a command gives PyTorch on the CPU: one, where the model is so small that more only wait for each
other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jitgraph.config import threads_are_given

if TYPE_CHECKING:
    from jitgraph.llm import LLM

SMALL_PARAMETERS = 16_000_000
"""Elements of the matrices of a decode step up to which one thread is as fast as two on an idle machine. PyTorch's
threads meet after each product by spinning; where somebody else has a core of theirs, each meeting waits for the
scheduler, and a small model then loses nine tenths of its speed."""


def settle_threads(llm: LLM) -> None:
    """One thread for a small model on the CPU, unless the user has said how many (``OMP_NUM_THREADS``). For a process
    of our own: a library leaves the caller's threads alone."""
    if llm.device.type == "cpu" and llm.spec.linear_parameters() <= SMALL_PARAMETERS and not threads_are_given():
        import torch

        torch.set_num_threads(1)
