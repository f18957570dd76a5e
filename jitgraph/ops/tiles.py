"""How the tensor-core kernel of ``linear_kernels.py`` cuts a product of a few dozen tokens. Plain values, no torch."""

from __future__ import annotations

from typing import NamedTuple

TILE_TOKENS = 128
"""Most tokens of a product that a table may give to that kernel: it has all of them in one tile."""
MAX_SPLIT = 4
LEAST_ROWS = 32
_WORD = "tile"


class Tile(NamedTuple):
    """One way to cut it; the tile's width is ``width`` of the tokens."""

    rows: int
    """Of the weight, in one program."""
    depth: int
    """Of the sum, in one turn."""
    split: int
    """Programs that share a sum, at most ``MAX_SPLIT``."""
    warps: int
    stages: int
    """Turns whose operands are on their way at once."""
    early: bool
    """Whether it is launched before the kernel in front has ended (``pdl.py``)."""

    def code(self) -> str:
        """As a table has it."""
        return " ".join((_WORD, *(str(int(value)) for value in self)))


def is_tile(code: str) -> bool:
    """Whether a table's code is one of these, and not an algorithm of the library."""
    return code.startswith(_WORD)


def tile_of(code: str) -> Tile:
    """The inverse of ``Tile.code``.

    Raises:
        ValueError: it is none.
    """
    word, *numbers = code.split()
    if word != _WORD or len(numbers) != len(Tile._fields):
        raise ValueError(f"{code!r} is no tile")
    rows, depth, split, warps, stages, early = (int(number) for number in numbers)
    tile = Tile(rows, depth, split, warps, stages, bool(early))
    if not 1 <= tile.split <= MAX_SPLIT or tile.rows < LEAST_ROWS:
        raise ValueError(f"{code!r} is out of range")
    return tile


def width(tokens: int) -> int:
    """Tokens of a tile that takes ``tokens`` (2 to ``TILE_TOKENS``) at once: a power of two, as the hardware wants."""
    return max(16, 1 << (tokens - 1).bit_length())
