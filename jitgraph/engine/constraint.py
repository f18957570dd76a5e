"""Running sequences that follow a grammar: what they have said so far, and the masks of what they may say next.

Engine's thread. A mask lies in host memory that the sampling ops read, in the row of its sequence's slot. It is written
when the slot is given away and then after each token that the host has read, so the next step of such a sequence can
only be launched after that: with one of them among its rows nothing runs ahead of the host.
"""

from __future__ import annotations

import numpy as np
import torch

from jitgraph.engine.grammar import CompiledGrammar, GrammarCompiler
from jitgraph.engine.scheduler import Sequence
from jitgraph.ops.slots import MASK_BITS
from jitgraph.types import FinishReason, Request


class Constraints:
    """One engine's sequences with a grammar."""

    def __init__(self, compiler: GrammarCompiler, masks: torch.Tensor) -> None:
        """``masks``: ``[S, ceil(V / 32)]``, see ``ops/slots.py``."""
        self.compiler = compiler
        self._masks = masks.numpy()
        self._words = memoryview(self._masks.data).cast("B")
        self._row_bytes = 4 * masks.shape[1]
        self._address = masks.data_ptr()
        self._held: dict[Sequence, _Held] = {}
        self._begun: set[Sequence] = set()
        self.failures = 0
        """Sequences that could not be kept to their grammar."""

    @property
    def active(self) -> bool:
        """Whether any sequence in a slot has a grammar."""
        return bool(self._begun)

    def check(self, request: Request) -> None:
        """Has the request's grammar compiled, if it has one, and waits for it.

        Raises:
            RequestError: the grammar cannot be used, and why.
        """
        if request.grammar is not None:
            self.compiler.start(request.grammar).result()

    def admit(self, sequence: Sequence) -> None:
        """Takes a new sequence in. Raises as ``check``."""
        if sequence.request.grammar is not None:
            self._held[sequence] = _Held(self.compiler.start(sequence.request.grammar).result())

    def begin(self, sequence: Sequence) -> None:
        """Writes a sequence's first mask; it has its slot, and its first step is about to be launched."""
        held, at = self._held[sequence], sequence.slot * self._row_bytes
        self._words[at : at + self._row_bytes] = held.compiled.first_mask
        self._begun.add(sequence)
        self._hold_back(sequence)

    def follow(self, sequence: Sequence, token: int) -> FinishReason | None:
        """Takes note of a token and, unless the sequence has ended with it, writes the mask of the next one.

        Returns:
            ``STOP`` where nothing can follow, ``FAILED`` where the grammar cannot be followed any further, else None.
        """
        held = self._held[sequence]
        matcher = held.matcher
        held.compiled.tokens += 1
        matcher.consume_token(token)
        if matcher.is_error():
            return self._fail(held.compiled)
        if matcher.is_stopped():
            return FinishReason.STOP
        if sequence.finished is not None:
            return None
        matcher.unsafe_compute_mask_ptr(self._address + sequence.slot * self._row_bytes, self._row_bytes)
        if matcher.is_error():
            return self._fail(held.compiled)
        self._hold_back(sequence)
        return None

    def drop(self, sequence: Sequence) -> None:
        """Forgets a sequence that has ended; others are ignored."""
        if self._held.pop(sequence, None) is not None:
            self._begun.discard(sequence)

    def _fail(self, compiled: CompiledGrammar) -> FinishReason:
        compiled.broken = True
        self.failures += 1
        return FinishReason.FAILED

    def _hold_back(self, sequence: Sequence) -> None:
        """Takes ids that would end the sequence too early out of its mask, unless the grammar allows nothing else."""
        params = sequence.request.params
        early = len(sequence.tokens) < params.min_tokens
        if not early and not params.ignore_eos:
            return
        barred = self.compiler.eos | sequence.stop_ids if early else self.compiler.eos
        row = self._masks[sequence.slot]
        others = row.view(np.uint32).copy()
        for token in barred:
            others[token // MASK_BITS] &= np.uint32(0xFFFFFFFF ^ (1 << token % MASK_BITS))
        if others.any():
            row[:] = others.view(np.int32)


class _Held:
    """A sequence's own copy of its grammar."""

    __slots__ = ("compiled", "matcher")

    def __init__(self, compiled: CompiledGrammar) -> None:
        self.compiled = compiled
        self.matcher = compiled.matcher.deep_copy()
