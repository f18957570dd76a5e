"""A plot from its description to a drawing for the page and its files. matplotlib is imported when plots are made, not
before; where it is missing, reports go without.

The same study gives the same bytes: no dates, and ids derived from a plot's name.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jitgraph.bench.plots_draw import HEIGHT_IN, STYLE, WIDTH_IN
from jitgraph.bench.plots_palette import with_variables
from jitgraph.bench.records import write_text
from jitgraph.errors import OutputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = "plots"
HOW_TO_GET = "plots need matplotlib: pip install 'jitgraph[bench]', then jitgraph report FOLDER"
PNG_DPI = 200
FONT = "font-family: 'DejaVu Sans', sans-serif"


@dataclass(frozen=True)
class Plot:
    """One figure."""

    name: str
    """Of its files, without a suffix."""
    section: str
    """Where it stands in the report."""
    caption: str
    alt: str
    """What it shows, for who cannot see it."""
    draw: Callable[[Figure], None]
    height_in: float = HEIGHT_IN


@dataclass(frozen=True)
class Drawn:
    """A figure that has been drawn."""

    plot: Plot
    page_svg: str
    """To stand in a page: its colours are the page's variables."""
    file_svg: str
    png: bytes


def missing_reason() -> str:
    """Why no plots can be drawn; empty where they can."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        return f"{HOW_TO_GET} ({error})"
    return ""


def draw(plot: Plot) -> Drawn:
    """Draws a plot. matplotlib must be there."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": plot.name}):
        layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
        figure = Figure(figsize=(WIDTH_IN, plot.height_in), layout=layout)
        plot.draw(figure)
        svg, png = io.StringIO(), io.BytesIO()
        nameless = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(svg, format="svg", metadata=nameless)
        figure.set_layout_engine("none")  # it stays as it was laid out
        figure.savefig(png, format="png", dpi=PNG_DPI, metadata={"Software": None})
    text = svg.getvalue()
    return Drawn(plot, _for_page(text), text, png.getvalue())


def _for_page(svg: str) -> str:
    """An SVG file's drawing as an element of a page: no prologue, no ids that another drawing could have as well, no
    size of its own, the page's font and colours."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<(g|text) id=\"[^\"]*\"", r"<\1", body)
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"<svg[^>]*(viewBox=\"[^\"]*\")[^>]*>", r"<svg \1 aria-hidden='true'>", body, count=1)
    body = re.sub(r"\s*\n\s*", " ", body)
    return with_variables(body.replace(FONT, "font-family: inherit"))


def write_plots(drawn: Sequence[Drawn], folder: Path) -> list[Path]:
    """Writes each plot's SVG and PNG into ``folder/plots``.

    Raises:
        OutputError: it cannot be written.
    """
    place = folder / FOLDER
    files = []
    try:
        place.mkdir(exist_ok=True)
        for one in drawn:
            svg, png = (place / f"{one.plot.name}.{suffix}" for suffix in ("svg", "png"))
            write_text(svg, one.file_svg)
            part = png.with_name(png.name + ".part")
            part.write_bytes(one.png)
            os.replace(part, png)
            files += [svg, png]
    except OSError as error:
        raise OutputError(
            f"{place} cannot be written ({error.strerror}): free space or choose another --output"
        ) from error
    return files
