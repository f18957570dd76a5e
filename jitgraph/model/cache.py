"""Paged KV cache: the pages on the device and the host's book of which are free.

Owned by the engine's thread. Page 0 is the dummy page: padding writes there and no sequence ever owns it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from jitgraph.errors import CapacityError
from jitgraph.model.device import check_memory
from jitgraph.model.prefix import PrefixIndex
from jitgraph.model.spec import ModelSpec


class PageAllocator:
    """Hands out whole pages. Pure host bookkeeping; page 0 is never given out.

    ``prefixes`` keeps pages of sequences that have ended for prompts that begin alike. They are lent: those that nobody
    holds count as free, and are forgotten when there are no others.
    """

    def __init__(self, pages: int, prefixes: PrefixIndex | None = None) -> None:
        assert pages >= 2, "a cache needs the dummy page and at least one more"
        self.total = pages - 1
        self.prefixes = prefixes
        self._free = list(range(pages - 1, 0, -1))

    @property
    def free(self) -> int:
        """Pages that no sequence needs, kept ones among them."""
        if self.prefixes is None:
            return len(self._free)
        self.settle()
        return len(self._free) + self.prefixes.idle

    def take(self, count: int) -> list[int] | None:
        """``count`` pages, or None where fewer are free. Kept ones go last, and then those first that were not used for
        longest."""
        self.settle()
        short = max(0, count - len(self._free))
        if short and (self.prefixes is None or short > self.prefixes.idle):
            return None
        pages = [self._free.pop() for _ in range(count - short)]
        return pages + self.prefixes.evict(short) if short and self.prefixes is not None else pages

    def upcoming(self, most: int) -> list[int]:
        """The pages that the next ``take`` gives, in its order: ``most``, or all that are free."""
        self.settle()
        pages = self._free[: -most - 1 : -1]
        return pages if self.prefixes is None else pages + self.prefixes.oldest(most - len(pages))

    def give_back(self, pages: list[int]) -> None:
        """Returns pages to the pool."""
        self._free.extend(pages)
        assert len(self._free) <= self.total, "a page was given back twice"

    def settle(self) -> None:
        """Puts away the pages of sequences that have ended. Every other call does so first; it is there for times when
        nobody waits."""
        if self.prefixes is not None and not self.prefixes.settled:
            self.give_back(self.prefixes.settle())

    def reset(self) -> None:
        """Takes all pages back from whoever has them, and forgets what they hold: after work that broke off anywhere,
        the books themselves included."""
        if self.prefixes is not None:
            self.prefixes.forget()
        self._free = list(range(self.total, 0, -1))


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
