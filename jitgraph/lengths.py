"""Lists of prompt lengths as a user writes them, turned into plain numbers. Pure, no torch.

``"1-50"``, ``"10,50,100-120"``, ``"buckets"``, ``64`` and sequences of such parts all mean a set of lengths.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeAlias

from jitgraph.errors import ConfigError

Lengths: TypeAlias = "int | str | Sequence[Lengths]"
"""A length, a text such as ``"1-50,64"`` or ``"buckets"``, or a sequence of these."""

BUCKETS = "buckets"
_RANGE = re.compile(r"(\d{1,12})(?:\s*-\s*(\d{1,12}))?", re.ASCII)


def parse_lengths(wanted: Lengths, buckets: Sequence[int], what: str = "precapture_lengths") -> tuple[int, ...]:
    """Every length that ``wanted`` names, ascending, once each.

    ``buckets`` is what the word ``buckets`` stands for; its last entry is also the largest length that may be named,
    because longer prompts run in chunks of that size.

    Raises:
        ConfigError: a part that is no length, below 1, over the largest bucket, or a range that descends; the message
            quotes it.
    """
    found: set[int] = set()
    _collect(wanted, buckets, what, found)
    return tuple(sorted(found))


def _collect(wanted: object, buckets: Sequence[int], what: str, found: set[int]) -> None:
    if isinstance(wanted, str):
        for part in wanted.split(","):
            found.update(_parse_part(part, buckets, what))
    elif isinstance(wanted, int) and not isinstance(wanted, bool):
        found.update(_within(wanted, wanted, str(wanted), buckets, what))
    elif isinstance(wanted, Sequence) and not isinstance(wanted, (bytes, bytearray)):
        for part in wanted:
            _collect(part, buckets, what, found)
    else:
        raise ConfigError(f"{what}: {wanted!r} is no length; give numbers, ranges such as 1-50, or {BUCKETS}")


def _parse_part(part: str, buckets: Sequence[int], what: str) -> Sequence[int]:
    """The lengths of one comma-separated part."""
    text = part.strip()
    if text.lower() == BUCKETS:
        return buckets
    match = _RANGE.fullmatch(text)
    if match is None:
        shown = repr(part) if text else "an empty part"
        raise ConfigError(f"{what}: {shown} is no length; give numbers, ranges such as 1-50, or {BUCKETS}")
    first = int(match[1])
    last = int(match[2]) if match[2] else first
    if last < first:
        raise ConfigError(f"{what}: the range {text!r} descends; write the smaller length first")
    return _within(first, last, text, buckets, what)


def _within(first: int, last: int, text: str, buckets: Sequence[int], what: str) -> Sequence[int]:
    """``first..last``, checked before it is built: a range of millions must not be."""
    largest = buckets[-1] if buckets else 0
    if first < 1 or last > largest:
        raise ConfigError(
            f"{what}: {text!r} is not between 1 and the largest bucket ({largest}); longer prompts run in such chunks"
        )
    return range(first, last + 1)
