"""Which of several engines gets a request: the one that most likely keeps the pages of its prompt's beginning, unless
it is clearly busier than another. Pure.

The choice is by rendezvous hashing: every engine has a score for every beginning, and the highest counts. So the next
turn of a chat comes to the engine that had the last one, without anybody keeping a table, and when an engine goes, only
what was its own moves.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

LEAST_TOKENS = 16
"""Shorter prompts leave nothing that is worth finding again: a page is about so long."""
KEY_TOKENS = 64
"""So many first tokens, or all, make the beginning: longer than most templates' own words, which all chats share, and
shorter than most prompts."""
CLEARLY_BUSIER = 2
"""An engine that has so many requests more than the least busy one is passed over."""


class Candidate(NamedTuple):
    """An engine that takes requests."""

    name: str
    """Stays the same when it is started again."""
    silent: bool
    """It has said nothing for a while, and may hang."""
    load: int
    """Its requests, running and waiting."""


def choose(ids: Sequence[int], salt: str, engines: Sequence[Candidate], turn: int = 0) -> int:
    """Index of the engine for a prompt; ``turn`` counts up, so that where the prompt does not matter equals take
    turns. There is at least one engine."""
    heard = [i for i, one in enumerate(engines) if not one.silent] or list(range(len(engines)))
    least = min(engines[i].load for i in heard)
    if len(ids) < LEAST_TOKENS:
        idle = [i for i in heard if engines[i].load == least]
        return idle[turn % len(idle)]
    key = beginning(ids, salt)
    return max(
        (i for i in heard if engines[i].load < least + CLEARLY_BUSIER), key=lambda i: (_score(key, engines[i].name), -i)
    )


def beginning(ids: Sequence[int], salt: str) -> bytes:
    """What stands for a prompt's beginning; prompts of other salts have others."""
    return blake2b(array("q", ids[:KEY_TOKENS]).tobytes() + salt.encode("utf-8", "surrogatepass")).digest()


def _score(key: bytes, name: str) -> bytes:
    return blake2b(key + name.encode(), digest_size=8).digest()
