"""Paged KV cache: the pages on the device and the host's book of which are free.

Owned by the engine's thread. Page 0 is the dummy page: padding writes there and no sequence ever owns it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from jitgraph.errors import CapacityError
from jitgraph.model.device import check_memory
from jitgraph.model.spec import ModelSpec


class PageAllocator:
    """Hands out whole pages. Pure host bookkeeping; page 0 is never given out."""

    def __init__(self, pages: int) -> None:
        assert pages >= 2, "a cache needs the dummy page and at least one more"
        self.total = pages - 1
        self._free = list(range(pages - 1, 0, -1))

    @property
    def free(self) -> int:
        """Pages nobody owns."""
        return len(self._free)

    def take(self, count: int) -> list[int] | None:
        """``count`` pages, or None where fewer are free."""
        if count > len(self._free):
            return None
        return [self._free.pop() for _ in range(count)]

    def upcoming(self, most: int) -> list[int]:
        """The pages that the next ``take`` gives, in its order: ``most``, or all that are free."""
        return self._free[: -most - 1 : -1]

    def give_back(self, pages: list[int]) -> None:
        """Returns pages to the pool."""
        self._free.extend(pages)
        assert len(self._free) <= self.total, "a page was given back twice"


@dataclass(frozen=True)
class KVCache:
    """``data``: ``[layers, 2, N, G, Hkv, Dh]``, keys at index 0 and values at 1."""

    data: torch.Tensor

    @classmethod
    def allocate(cls, spec: ModelSpec, pages: int, page_size: int, dtype: torch.dtype, device: torch.device) -> KVCache:
        """Zeroed pages. Zeros, not garbage: a masked key still multiplies its value by 0, and 0 x NaN is NaN.

        Raises:
            CapacityError: the device has not that much memory; the message has both figures.
        """
        need = spec.kv_bytes_per_token(dtype.itemsize) * pages * page_size
        check_memory(need, device, "the KV cache's pages", "lower max_model_len, max_streams or kv_cache_memory")
        shape = (spec.num_layers, 2, pages, page_size, spec.num_kv_heads, spec.head_dim)
        try:
            return cls(torch.zeros(shape, dtype=dtype, device=device))
        except (torch.OutOfMemoryError, RuntimeError) as error:
            raise CapacityError(
                f"the KV cache needs {need / 2**30:.2f} GiB, more than {device} can give: "
                "lower max_model_len, max_streams or kv_cache_memory"
            ) from error

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value pages of one layer, each ``[N, G, Hkv, Dh]``."""
        return self.data[index, 0], self.data[index, 1]
