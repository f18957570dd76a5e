"""jitgraph: JIT-compiled kernels inside CUDA graphs, for the lowest latency an LLM can have on one GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jitgraph.types import Grammar, RequestOutput, SamplingParams
from jitgraph.version import VERSION

if TYPE_CHECKING:
    from jitgraph.llm import LLM
    from jitgraph.server.api_client import Client
    from jitgraph.server.async_client import AsyncClient

__version__ = VERSION
__all__ = ["LLM", "AsyncClient", "Client", "Grammar", "RequestOutput", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    """Loads ``LLM``, and with it torch, only when somebody asks for it: clients and the server process never do."""
    if name == "LLM":
        from jitgraph.llm import LLM

        return LLM
    if name == "Client":
        from jitgraph.server.api_client import Client

        return Client
    if name == "AsyncClient":
        from jitgraph.server.async_client import AsyncClient

        return AsyncClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
