"""How much text one token can stand for, read from a tokenizer's own rules. Pure; no torch.

With it a text that is too long for a model is known before it is tokenised, which takes seconds and hundreds of bytes
for each token where somebody sends megabytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import tokenizers

from jitgraph.text.pieces import byte_alphabet

_SHRINK = {"NFC": 4, "NFD": 4}
"""Bytes that a normal form can make one of, at most: 3.5 and 3 in Unicode 14, as a search of all characters gives."""
_KEEP_ALL = ("ByteLevel", "Digits", "Metaspace", "UnicodeScripts")
"""Ways to cut a text that leave nothing out."""


def bytes_per_token(backend: tokenizers.Tokenizer, layout: Mapping[str, Any]) -> int | None:
    """Most bytes of UTF-8 that a text can have for each of its tokens; None where there is no such number: a rule drops
    parts of the text, or makes any length of it one token.

    Args:
        backend: the tokenizer.
        layout: its tokenizer.json.
    """
    normaliser = layout.get("normalizer")
    shrink = _shrink(normaliser)
    added = list(backend.get_added_tokens_decoder().values())
    if shrink is None or any(token.lstrip or token.rstrip for token in added):  # these take any space beside them
        return None
    steps = list(_steps(layout.get("pre_tokenizer"), "pretokenizers"))
    if not all(_keeps_all(step) for step in steps):
        return None
    vocabulary = backend.get_vocab(with_added_tokens=False)
    kinds = {step["type"] for step in (*steps, *_steps(normaliser, "normalizers"))}
    if not _knows_every_byte(layout["model"], "ByteLevel" in kinds, vocabulary):
        return None
    # In the byte-level alphabet a character stands for a byte; where it does not, UTF-8 has no less than the text.
    measure = len if "ByteLevel" in kinds else _utf8
    longest = max((measure(piece) for piece in vocabulary), default=0)
    for token in added:
        written = token.content
        normal = backend.normalizer.normalize_str(written) if token.normalized and backend.normalizer else written
        longest = max(longest, _utf8(written), _utf8(normal))
    return longest * shrink


def _utf8(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _steps(part: Any, nested: str) -> Iterator[Mapping[str, Any]]:
    """The parts of a section of a tokenizer.json, nested sequences flattened."""
    if part is None:
        return
    if part["type"] == "Sequence":
        for inner in part[nested]:
            yield from _steps(inner, nested)
    else:
        yield part


def _shrink(normaliser: Any) -> int | None:
    """How many bytes of a text can become one; None where any number can."""
    product = 1
    for step in _steps(normaliser, "normalizers"):
        kind = step["type"]
        if kind in _SHRINK:
            product *= _SHRINK[kind]
        elif kind == "Replace":
            found = step["pattern"].get("String")
            if not found or _utf8(step["content"]) < _utf8(found):
                return None
        elif kind not in ("ByteLevel", "Prepend"):
            return None
    return product


def _keeps_all(step: Mapping[str, Any]) -> bool:
    if step["type"] in ("Split", "Punctuation"):
        return str(step.get("behavior")).lower() != "removed"
    return step["type"] in _KEEP_ALL


def _knows_every_byte(model: Mapping[str, Any], byte_level: bool, vocabulary: Mapping[str, int]) -> bool:
    """Whether nothing is unknown to the model, and so joined with its neighbours or dropped."""
    if byte_level:
        return model["type"] == "BPE" and all(char in vocabulary for char in byte_alphabet())
    return bool(model.get("byte_fallback")) and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
