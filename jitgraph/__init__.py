"""jitgraph: JIT-compiled kernels inside CUDA graphs, for the lowest latency an LLM can have on one GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jitgraph.types import RequestOutput, SamplingParams

if TYPE_CHECKING:
    from jitgraph.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "RequestOutput", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    """Loads ``LLM``, and with it torch, only when somebody asks for it: the server process never does."""
    if name == "LLM":
        from jitgraph.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
