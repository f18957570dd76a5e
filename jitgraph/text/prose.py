"""The project's own English prose: real text for benchmark prompts, so that nobody measures padding.

No torch; any process may read it. Always holds: the text is the same on every machine of one release.
"""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).resolve().parent.parent / "assets"
"""Folder of the files that ship with the package."""


def prose() -> str:
    """Several short essays, over 1,400 words: more than 1,200 tokens of the bundled tokenizer.

    Returns:
        The text, paragraphs separated by an empty line.
    """
    return (ASSETS / "prose.txt").read_text(encoding="utf-8")
