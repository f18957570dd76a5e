"""The inbox's layout: how the host hands a step its inputs through mapped memory. No torch.

``inbox[launch % depth]`` is one row of int32 words, written by the host before launch number ``launch`` and read by the
first op of that launch. So a launch takes no arguments and needs no copy beside it.
"""

from __future__ import annotations

from typing import NamedTuple

ADMIT = 0
"""1 where the row carries a new sequence's row of the slot table."""
SLOT = 4
START = 5
COUNT = 6
EMIT = 7
"""``SLOT`` to ``EMIT`` describe a chunk of a prompt: whose, its first position, its tokens, whether it ends the
prompt."""
ROWS = 8
MAX_ROWS = 8
"""Slots of a decode step, one word each."""
HEADER = ROWS + MAX_ROWS
"""Words before the slot table's row, which is followed by the chunk's token ids."""


class InboxLayout(NamedTuple):
    """Where things are in a row of an engine's inbox."""

    slot_words: int
    """Words of a row of the slot table."""
    prompt_words: int
    """Token ids of the largest chunk."""

    @property
    def prompt(self) -> int:
        """First token id."""
        return HEADER + self.slot_words

    @property
    def width(self) -> int:
        """Words of a row, a multiple of 16."""
        return -(-(self.prompt + self.prompt_words) // 16) * 16
