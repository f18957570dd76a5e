"""What a launch does instead of running: the mode of the innermost ``compile_only`` or ``collect`` block.

A mode belongs to the thread (or task) that opened its block; launches of other threads stay real.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol, TypeVar

from jitgraph.jit.specialise import Specialisation

if TYPE_CHECKING:
    from jitgraph.jit.kernel import Kernel


class Mode(Protocol):
    """Takes launches over."""

    @property
    def arch(self) -> int | None:
        """Compute capability that launches are for, 90 for 9.0; None is that of torch's current device."""

    def add(self, kernel: Kernel, spec: Specialisation) -> object:
        """Hears about a launch of ``kernel`` that needs ``spec``."""


ACTIVE_MODE: ContextVar[Mode | None] = ContextVar("jitgraph_jit_mode", default=None)
"""The mode of this context; None means that launches are real."""

_M = TypeVar("_M", bound=Mode)


@contextmanager
def active(mode: _M) -> Iterator[_M]:
    """Inside the block ``mode`` takes every launch over."""
    token = ACTIVE_MODE.set(mode)
    try:
        yield mode
    finally:
        ACTIVE_MODE.reset(token)
