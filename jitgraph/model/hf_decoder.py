"""Decoders that run a model of transformers through its own forward, in the place of ``decoder.Decoder``.

Engine's thread and stream. ``HfDecoder`` works on the engine's paged cache (``hf_attention``): all its steps are data,
so they are captured, batched and shared like native ones. ``OwnCacheDecoder`` serves models whose attention cannot be
replaced: one forward for each sequence with the cache that the model itself grows. The host decides in it, so it is
never captured.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from jitgraph.errors import ConfigError
from jitgraph.model.batch import Batch, Workspace
from jitgraph.model.cache import KVCache
from jitgraph.model.decoder import Section
from jitgraph.model.hf_attention import PagedPass, working_on
from jitgraph.model.spec import ModelSpec
from jitgraph.ops.select import Ops
from jitgraph.ops.slots import SlotTable


def accepted(model: Any) -> frozenset[str]:
    """The arguments that a model's forward names."""
    return frozenset(inspect.signature(model.forward).parameters)


def _in_one(*_: Any) -> list[Section]:
    raise ConfigError("graph_scope='static' is for native models: this one runs through its own forward as a whole")


@dataclass
class HfDecoder:
    """A model whose attention works on the paged cache."""

    native: ClassVar[bool] = False
    capturable: ClassVar[bool] = True
    spec: ModelSpec
    model: Any
    ops: Ops
    layers: dict[int, int]
    """A layer's own index to its place in the cache."""
    _last: PagedPass | None = field(default=None, init=False)
    _scores: torch.Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._takes = accepted(self.model)

    sections = staticmethod(_in_one)

    def forward(self, phase: str, batch: Batch, work: Workspace, cache: KVCache, slots: SlotTable) -> None:
        """See ``Decoder``."""
        self._last, self._scores = PagedPass(phase, batch, work, cache, slots, self.ops, self.layers), None
        work.logits.copy_(self.logits(self._last, batch.sample_index))

    def stages(
        self,
        phase: str,
        batch: Batch,
        work: Workspace,
        cache: KVCache,
        slots: SlotTable,
        whole: bool = False,
        brief: bool = False,
    ) -> Iterator[None]:
        """See ``Decoder``; all in one piece, every row goes all the way, and no layer is left out."""
        self.forward(phase, batch, work, cache, slots)
        yield

    def logits(self, what: PagedPass, wanted: torch.Tensor | None) -> torch.Tensor:
        """Logits of the ``wanted`` tokens of a pass, ``[R, V]`` in whatever dtype the model gives; None wants all."""
        batch = what.batch
        settings: dict[str, Any] = {"use_cache": False, "position_ids": batch.positions.long()[None]}
        keep = wanted is not None and "logits_to_keep" in self._takes
        if keep and wanted is not None:
            settings["logits_to_keep"] = wanted.long()
        with working_on(what):
            found: torch.Tensor = self.model(input_ids=batch.token_ids.long()[None], **settings).logits[0]
        return found if wanted is None or keep else found[wanted.long()]

    def score(self, first: int, logits: torch.Tensor, count: int, *_: Any) -> None:
        """See ``Decoder``. The whole chunk is computed once more, all its logits at once."""
        if self._last is None or self._last.phase != "prefill":
            return
        if self._scores is None:
            self._scores = self.logits(self._last, None)
        found = self._scores[first : first + count]  # fewer when warming up
        logits[: found.shape[0]].copy_(found)
        if first + count >= self._scores.shape[0]:
            self._scores = None


@dataclass
class _Grown:
    """What is known of one slot's sequence."""

    ids: list[int]
    """Its tokens so far."""
    cache: Any = None
    """The model's own, of all of them; None while the prompt is not complete."""


@dataclass
class OwnCacheDecoder:
    """A model that runs with the cache it grows itself.

    A prompt is computed as a whole, as ``generate`` does it: chunks but the last only hand over their tokens. Not every
    model can go on with several tokens at a time, and where the rotation depends on the length it would be another.
    """

    native: ClassVar[bool] = False
    capturable: ClassVar[bool] = False
    spec: ModelSpec
    model: Any
    ops: Ops
    turn: int = 0
    """Tokens after which all keys are rotated otherwise, so that a sequence that passes them is computed anew; 0 where
    there is no such length."""
    _grown: dict[int, _Grown] = field(default_factory=dict, init=False)
    _chunk: tuple[_Grown, int] | None = field(default=None, init=False)
    _scores: torch.Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._takes = accepted(self.model)

    sections = staticmethod(_in_one)

    def forward(self, phase: str, batch: Batch, work: Workspace, cache: KVCache, slots: SlotTable) -> None:
        """See ``Decoder``; positions, slots and ids are read by the host."""
        positions, owners, ids = (t.tolist() for t in (batch.positions, batch.token_slot, batch.token_ids))
        work.logits.zero_()
        self._chunk = self._scores = None
        if phase == "prefill":
            owner, count = owners[0], owners.count(owners[0])  # padding belongs to the dummy
            if owner != slots.dummy:
                emits = int(batch.sample_slot[0]) != slots.dummy
                found = self.extend(owner, positions[0], ids[:count], emits)
                self._chunk = self._grown[owner], positions[0]
                if found is not None:
                    work.logits[0].copy_(found)
            return
        for row, (slot, position, token) in enumerate(zip(owners, positions, ids, strict=True)):
            if slot != slots.dummy:
                found = self.extend(slot, position, [token])
                assert found is not None
                work.logits[row].copy_(found)

    def stages(
        self,
        phase: str,
        batch: Batch,
        work: Workspace,
        cache: KVCache,
        slots: SlotTable,
        whole: bool = False,
        brief: bool = False,
    ) -> Iterator[None]:
        """See ``Decoder``; all in one piece, every row goes all the way, and no layer is left out."""
        self.forward(phase, batch, work, cache, slots)
        yield

    def extend(self, slot: int, start: int, ids: list[int], wanted: bool = True) -> torch.Tensor | None:
        """Adds tokens that follow the first ``start`` of a slot's sequence; the logits ``[V]`` after the last, or None
        where nobody wants them yet."""
        known = self._grown[slot] if start else _Grown([])
        assert len(known.ids) == start, "a sequence goes on where it stopped"
        known.ids = [*known.ids, *ids]
        self._grown[slot] = known
        if not wanted:
            return None
        anew = known.cache is None or (self.turn and start <= self.turn < len(known.ids))
        logits, known.cache = self._run(known.ids if anew else ids, len(known.ids), None if anew else known.cache)
        return logits[-1]

    def _run(self, ids: list[int], end: int, cache: Any, keep: bool = True) -> tuple[torch.Tensor, Any]:
        """Logits ``[n, V]`` of the last n of ``end`` tokens, ``cache`` being of those before; and the cache of all."""
        device = self.model.get_input_embeddings().weight.device
        settings: dict[str, Any] = {"use_cache": keep, "past_key_values": cache}
        if "attention_mask" in self._takes:
            settings["attention_mask"] = torch.ones(1, end, dtype=torch.long, device=device)
        if "position_ids" in self._takes:
            settings["position_ids"] = torch.arange(end - len(ids), end, device=device)[None]
        if "logits_to_keep" in self._takes and keep:
            settings["logits_to_keep"] = 1
        found = self.model(input_ids=torch.tensor([ids], device=device), **settings)
        logits: torch.Tensor = found.logits[0]
        return logits, found.past_key_values if keep else None

    def score(self, first: int, logits: torch.Tensor, count: int, *_: Any) -> None:
        """See ``Decoder``. The prompt is computed once more up to here, all its logits at once."""
        if self._chunk is None:
            return
        known, start = self._chunk
        if self._scores is None:
            self._scores = self._run(known.ids, len(known.ids), None, keep=False)[0][start:]
        found = self._scores[first : first + count]  # fewer when warming up
        logits[: found.shape[0]].copy_(found)
