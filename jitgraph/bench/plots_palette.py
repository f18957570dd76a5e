"""Colours of the report and its plots, in a light and a dark variant. Owns nothing.

A plot is drawn in the light colours, each of which belongs to one name; in the page a name stands instead
(``var(--name)``), so that one drawing suits both schemes. In either, text and background have a contrast of at least
4.5, lines and background of at least 3.
"""

from __future__ import annotations

from jitgraph.bench.plan import ALL_CASES

COLOURS: dict[str, tuple[str, str]] = {
    "back": ("#f6f7f6", "#121614"),
    "card": ("#ffffff", "#1a201d"),
    "line": ("#d3d9d6", "#364039"),
    "text": ("#17201c", "#e8eeea"),
    "soft": ("#55625c", "#a3b0a9"),
    "accent": ("#1d6b50", "#59c49e"),
    "own": ("#e6f1ec", "#20312a"),
    "warn": ("#8a5a00", "#e3b04b"),
    "baseline": ("#6b746f", "#9ba6a0"),
    "cuda-graph": ("#b8560f", "#f0a35e"),
    "jit": ("#2b5fa8", "#86b4f5"),
    "hybrid": ("#1f6f54", "#58c39d"),
    "tensorrt-llm": ("#7b3fb0", "#c49bf0"),
    "jit-all": ("#b0305f", "#f08fb0"),
    "split": ("#786800", "#d6c04a"),
    "hf-compile": ("#3a5a2a", "#a6cf8f"),
    "hf-graphs": ("#a03a6a", "#e58ab8"),
    "vllm": ("#0f6a80", "#6cc0d4"),
    "openai": ("#5a5a10", "#c9c96a"),
    "other-1": ("#00708a", "#5cc8e0"),
    "other-2": ("#8a4b2a", "#d9a384"),
    "other-3": ("#4b4ba8", "#a5a5f5"),
    "phase-1": ("#aab3ae", "#59645e"),
    "phase-2": ("#12423a", "#8fe0c4"),
    "phase-3": ("#2f8f75", "#4fb394"),
    "phase-4": ("#d08a2e", "#e0a04a"),
    "phase-5": ("#335f9e", "#7fa9e6"),
    "phase-6": ("#8fb7a6", "#2f7a62"),
    "phase-7": ("#7d4f9e", "#b48ad6"),
    "phase-8": ("#a8452c", "#e88a72"),
}
"""Name to the colour in light and in dark surroundings."""
OTHERS = ("other-1", "other-2", "other-3")
"""For whatever has no colour of its own, in turn."""
PHASES = tuple(name for name in COLOURS if name.startswith("phase-"))
MARKERS = {
    "baseline": "o",
    "cuda-graph": "s",
    "jit": "^",
    "hybrid": "D",
    "tensorrt-llm": "v",
    "jit-all": "P",
    "split": "X",
    "hf-compile": "<",
    "hf-graphs": ">",
    "vllm": "*",
    "openai": "h",
}
"""Shapes tell cases apart where colours cannot."""


def case_colour(case: str) -> str:
    """The name of a case's colour."""
    if case in COLOURS:
        return case
    return OTHERS[ALL_CASES.index(case) % len(OTHERS)] if case in ALL_CASES else OTHERS[0]


def case_marker(case: str) -> str:
    """The shape of a case's points."""
    return MARKERS.get(case, "p")


def light(name: str) -> str:
    """What a plot is drawn in."""
    return COLOURS[name][0]


def css_variables() -> str:
    """The colours as variables of a style sheet; print is always light."""
    both = ("\n".join(f"  --{name}: {pair[scheme]};" for name, pair in COLOURS.items()) for scheme in (0, 1))
    bright, dark = both
    return (
        f":root {{\n  color-scheme: light dark;\n{bright}\n}}\n"
        f"@media screen and (prefers-color-scheme: dark) {{\n:root {{\n{dark}\n}}\n}}\n"
    )


def with_variables(drawing: str) -> str:
    """A drawing's light colours replaced by the variables they stand for."""
    for name, (colour, _) in COLOURS.items():
        drawing = drawing.replace(colour, f"var(--{name})")
    return drawing
