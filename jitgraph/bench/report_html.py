"""HTML from text: tables, figures and the page around them. Every piece of text is escaped here. Owns nothing.

A page is whole: its style sheet is inside, and its policy forbids it to fetch anything.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from html import escape

from jitgraph.bench.plots import Drawn
from jitgraph.bench.plots_palette import css_variables
from jitgraph.bench.table_text import NO_VALUE
from jitgraph.text.prose import ASSETS

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class Section:
    """A part of a page with a heading; ``html`` is finished."""

    anchor: str
    heading: str
    html: str


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph, of a CSS class where ``kind`` names one."""
    return f"<p{_classes(kind)}>{escape(text)}</p>"


def bullet_list(items: Sequence[str]) -> str:
    """A list; nothing where it is empty."""
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>" if items else ""


def table(
    caption: str,
    head: Sequence[str],
    lines: Sequence[Sequence[str]],
    *,
    text_columns: Collection[int] = (0,),
    strong: Collection[tuple[int, int]] = (),
    soft: Collection[tuple[int, int]] = (),
    last_apart: bool = False,
) -> str:
    """A table that scrolls sideways in a box of its own.

    Args:
        head: column titles; none are shown where all are empty.
        text_columns: columns that are words: to the left. All others are figures. The first one heads its line.
        strong: (line, column) of cells that stand out, such as a winner's.
        soft: (line, column) of cells that say why there is no figure.
        last_apart: the last line sums up the others.
    """

    def cell(line: int, column: int, text: str) -> str:
        kinds = ["words"] if column in text_columns else []
        kinds += [name for name, which in (("strong", strong), ("why", soft)) if (line, column) in which]
        tag, scope = ("th", ' scope="row"') if column == 0 else ("td", "")
        return f"<{tag}{scope}{_classes(*kinds)}>{escape(text or NO_VALUE)}</{tag}>"

    titles = (
        f'<th scope="col"{_classes("words" if i in text_columns else "")}>{escape(text)}</th>'
        for i, text in enumerate(head)
    )
    rows = []
    for number, line in enumerate(lines):
        apart = " class='sum'" if last_apart and number == len(lines) - 1 else ""
        rows.append(f"<tr{apart}>{''.join(cell(number, i, text) for i, text in enumerate(line))}</tr>")
    top = f"<thead><tr>{''.join(titles)}</tr></thead>" if any(head) else ""
    return (
        f'<div class="box"><p class="caption">{escape(caption)}</p>'
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption, quote=True)}">'
        f"<table>{top}<tbody>{''.join(rows)}</tbody></table></div></div>"
    )


def side_by_side(*parts: str) -> str:
    """Tables beside each other where there is room."""
    return f'<div class="pair">{"".join(parts)}</div>'


def details(summary: str, html: str) -> str:
    """Something that opens on request."""
    return f"<details><summary>{escape(summary)}</summary>{html}</details>"


def figures(drawn: Sequence[Drawn], section: str) -> str:
    """The plots of a section side by side where there is room; nothing where it has none."""
    found = "".join(
        f'<figure><div role="img" aria-label="{escape(one.plot.alt, quote=True)}">{one.page_svg}</div>'
        f"<figcaption>{escape(one.plot.caption)}</figcaption></figure>"
        for one in drawn
        if one.plot.section == section
    )
    return f'<div class="figures">{found}</div>' if found else ""


def tiles(items: Sequence[tuple[str, str, str]]) -> str:
    """(what, figure, beside it): the few numbers that a reader wants first."""
    inside = "".join(
        f"<div><dt>{escape(what)}</dt><dd><b>{escape(figure)}</b><span>{escape(beside)}</span></dd></div>"
        for what, figure, beside in items
    )
    return f'<dl class="tiles">{inside}</dl>' if items else ""


def page(heading: str, lead: str, sections: Sequence[Section], banner: str = "") -> str:
    """A whole page."""
    style = css_variables() + (ASSETS / "report" / "report.css").read_text(encoding="utf-8")
    links = "".join(f'<a href="#{one.anchor}">{escape(one.heading)}</a>' for one in sections)
    parts = "".join(
        f'<section id="{one.anchor}"><h2>{escape(one.heading)}</h2>{one.html}</section>\n' for one in sections
    )
    return (
        "<!DOCTYPE html>\n"
        '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(heading)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(heading)}</h1>{paragraph(lead)}{paragraph(banner, 'banner') if banner else ''}"
        f'<nav aria-label="Sections">{links}</nav></header>\n<main>\n{parts}</main>\n</body>\n</html>\n'
    )


def _classes(*kinds: str) -> str:
    named = " ".join(kind for kind in kinds if kind)
    return f' class="{named}"' if named else ""
