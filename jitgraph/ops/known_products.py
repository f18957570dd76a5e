"""Tables of measured product algorithms that come with the package: a device that is in one starts without measuring,
and has the same bits on every machine.

``benchmarks/tune_products.py`` makes them, searching longer than a start could. A table is a JSON file: for which
device, version of cuBLASLt and dtype it holds, the shapes and token counts that were measured, and the codes of the
algorithms that beat torch there; what was measured and has no code is left to torch. Up to ``tiles.TILE_TOKENS`` a code
may be a tile of the project's own kernel instead.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jitgraph.ops.reference_linear import ProductShape, Use

FOLDER = Path(__file__).resolve().parent.parent / "assets" / "products"

Codes = dict[str, str]
"""Shape, number of tokens and use (``code_name``) to an algorithm's code in hexadecimal, or to a tile's; only where it
beats torch."""


class Where(NamedTuple):
    """What a code means something to: nothing can be said about another device, version or dtype."""

    device: str
    library: int
    """Version of cuBLASLt."""
    dtype: str
    """As torch prints it."""


def code_name(n: int, k: int, tokens: int, use: Use) -> str:
    """The name of a product in a table."""
    return f"{n}x{k}x{tokens}{use.value}"


def known_codes(
    where: Where, shapes: Iterable[ProductShape], points: Sequence[int], folder: Path = FOLDER
) -> Codes | None:
    """The codes of these shapes at these token counts; None where no table has all of them."""
    wanted = [[shape.n, shape.k, shape.add] for shape in shapes]
    for path in sorted(folder.glob("*.json")):
        table = json.loads(path.read_text(encoding="utf-8"))
        of_this = (table["device"], table["library"], table["dtype"]) == where
        if of_this and set(points) <= set(table["points"]) and all(one in table["shapes"] for one in wanted):
            codes: Codes = table["codes"]
            return codes
    return None


def table(where: Where, shapes: Iterable[ProductShape], points: Sequence[int], codes: Mapping[str, str]) -> str:
    """A table as its file has it."""
    document: dict[str, Any] = {**where._asdict(), "points": list(points)}
    document["shapes"] = [[shape.n, shape.k, shape.add] for shape in shapes]
    return json.dumps({**document, "codes": dict(codes)}, indent=0) + "\n"
