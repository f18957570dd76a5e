"""jitgraph: JIT-compiled kernels inside CUDA graphs, for the lowest latency an LLM can have on one GPU."""

from __future__ import annotations

import gc
import importlib
from typing import TYPE_CHECKING, Any

from jitgraph.types import Grammar, RequestOutput, SamplingParams
from jitgraph.version import VERSION

if TYPE_CHECKING:
    from jitgraph.llm import LLM
    from jitgraph.server.api_client import Client
    from jitgraph.server.async_client import AsyncClient

_LAZY = {
    "LLM": "jitgraph.llm",
    "Client": "jitgraph.server.api_client",
    "AsyncClient": "jitgraph.server.async_client",
}
__version__ = VERSION
__all__ = ["LLM", "AsyncClient", "Client", "Grammar", "RequestOutput", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    """Loads ``LLM``, and with it torch, only when somebody asks for it: clients and the server process never do.

    Nothing is collected meanwhile: next to nothing of a module is garbage, and looking for it takes a fifteenth of the
    time that torch takes."""
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    collecting = gc.isenabled()
    gc.disable()
    try:
        return getattr(importlib.import_module(module), name)
    finally:
        if collecting:
            gc.enable()
