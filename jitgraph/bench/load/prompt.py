"""Chat messages of about a wanted length. Pure, owns nothing."""

from __future__ import annotations

from collections.abc import Sequence

# Common words: in the vocabularies of most models each is one token, its space included.
_TEXT = """
the of and to in is that for it as was with be by on not he his but at are this have from or had an they which one
you were all her she there would their we him been has when who will no more if out so up said what its about than
into them can only other time new some could these two may first then do any like my now over such our man me even
most made after also did many must before back see through way where get much go well your know should down work
year because come
"""
_WORDS = tuple(_TEXT.split())


def chat_text(ids: Sequence[int]) -> str:
    """A word for each id, so that the message has about as many tokens; the server's template adds its own."""
    return " ".join(_WORDS[i % len(_WORDS)] for i in ids)
