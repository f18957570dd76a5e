"""Token ids to bytes, and bytes to text, one token at a time. The one place that knows how tokenizers decode.

No torch; owned by whichever process turns ids into text. A tokenizer's own ``decode`` works on whole lists, and
cutting its result into tokens goes wrong wherever a character spans tokens. Here each id has its bytes, which
depend on nothing but whether it opens the text, and the text is the UTF-8 reading of the bytes joined together.

Always holds: the text of a list of ids is the same whether it is read at once or token by token, at a cost per
token that does not grow with the text. On valid UTF-8 it equals what ``tokenizers`` gives; where a byte-fallback
tokenizer's bytes are broken, each broken sequence becomes one U+FFFD (``tokenizers`` blanks the whole run of byte
tokens, which no text already shown could take back).
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Any

import tokenizers

from jitgraph.errors import CheckpointError, RequestError

SUPPORTED_DECODERS = ("ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece")
"""Parts of a tokenizer.json decoder whose result for a token does not depend on the tokens after it."""

_ANCHOR = "a"
"""A harmless token put before another one, to learn how the latter decodes when it does not open the text."""
_PRIME_TOKENS = 8
"""Visible prompt tokens re-read for an unfinished character, which is 3 bytes at most."""


def byte_alphabet() -> dict[str, int]:
    """The GPT-2 alphabet of byte-level tokenizers: printable Latin-1 stands for itself, the rest moved past 255."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(moved)}


def _decoder_parts(decoder: Any) -> list[str]:
    """Names of the parts of a tokenizer.json ``decoder`` section, nested sequences flattened."""
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [name for part in decoder["decoders"] for name in _decoder_parts(part)]
    return [str(decoder["type"])]


def placeholder(token_id: int) -> str:
    """What an id without an entry in the tokenizer decodes to, as in ``<|31999|>``.

    Models with more rows in the embedding than entries in the tokenizer can choose such ids; showing them keeps
    the text and the token count in step.
    """
    return f"<|{token_id}|>"


class TokenPieces:
    """The bytes of every token id of one tokenizer, looked up lazily.

    Args:
        tokenizer: a fast tokenizer whose added tokens are final.
        decoder: the section of that name in its tokenizer.json.
        source: what to call it in an error.

    Raises:
        CheckpointError: the tokenizer decodes in a way that needs later tokens; the message names the part.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, decoder: Any, source: str) -> None:
        parts = _decoder_parts(decoder)
        unsupported = sorted(set(parts) - set(SUPPORTED_DECODERS))
        if unsupported or ("ByteLevel" in parts and set(parts) - {"ByteLevel", "Fuse"}):
            raise CheckpointError(
                f"the decoder of {source} ({' + '.join(parts)}) cannot decode token by token; use a tokenizer "
                f"whose decoder is ByteLevel, or made of {', '.join(SUPPORTED_DECODERS[1:])}"
            )
        self._tokenizer = tokenizer
        self._alphabet = byte_alphabet() if "ByteLevel" in parts else None
        self._byte_fallback = "ByteFallback" in parts
        self._special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._cache: dict[tuple[int, bool], bytes] = {}

    def is_special(self, token_id: int) -> bool:
        """True for ids that steer the model and are not part of its text."""
        return token_id in self._special

    def bytes_of(self, token_id: int, opens_text: bool) -> bytes:
        """UTF-8 bytes of one id; ``opens_text`` where no visible token stands before it (it may lose its space)."""
        key = (token_id, opens_text)
        piece = self._cache.get(key)
        if piece is None:
            piece = self._cache[key] = self._bytes_of(token_id, opens_text)
        return piece

    def _bytes_of(self, token_id: int, opens_text: bool) -> bytes:
        if token_id < 0:
            raise RequestError(f"token ids are whole numbers from 0 up, not {token_id}")
        token = self._tokenizer.id_to_token(token_id) if token_id < 2**32 else None
        if token is None:
            return placeholder(token_id).encode()
        if self._alphabet is not None:
            if all(char in self._alphabet for char in token):
                return bytes(self._alphabet[char] for char in token)
            return token.encode()
        if self._byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            byte = int(token[3:5], 16)
            # An ASCII byte is a whole character and may be the space that the decoder strips from the start.
            return self._join([token]).encode() if opens_text and byte < 0x80 else bytes([byte])
        if opens_text:
            return self._join([token]).encode()
        return self._join([_ANCHOR, token])[len(self._join([_ANCHOR])) :].encode()

    def _join(self, tokens: list[str]) -> str:
        decoder = self._tokenizer.decoder
        # Without a decoder, tokenizers puts a space between tokens.
        return " ".join(tokens) if decoder is None else str(decoder.decode(tokens))


class TextStream:
    """Reads ids as text: holds back a character until its last byte is there, replaces what can never be one."""

    def __init__(self, pieces: TokenPieces, skip_special_tokens: bool = True) -> None:
        self._pieces = pieces
        self._skip_special = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._opens_text = True
        self._borrowed = False

    def prime(self, prompt_ids: Iterable[int]) -> None:
        """Take note of the prompt that the ids continue, without its text ever showing.

        A character begun by the prompt and finished by the new ids is new text; broken bytes at the prompt's end
        are the prompt's and never show.
        """
        visible = [i for i in prompt_ids if not self._hidden(i)]
        for token_id in visible[-_PRIME_TOKENS:]:
            self._utf8.decode(self._pieces.bytes_of(token_id, self._opens_text))
            self._opens_text = False
        self._borrowed = self._utf8.getstate()[0] != b""

    def push(self, token_id: int) -> str:
        """The text completed by one more id, possibly empty."""
        if self._hidden(token_id):
            return ""
        piece = self._pieces.bytes_of(token_id, self._opens_text)
        self._opens_text = False
        return self._own(self._utf8.decode(piece))

    def finish(self) -> str:
        """What an unfinished last character leaves: U+FFFD, or nothing."""
        return self._own(self._utf8.decode(b"", final=True))

    def _hidden(self, token_id: int) -> bool:
        return self._skip_special and self._pieces.is_special(token_id)

    def _own(self, text: str) -> str:
        """Drop the replacement for the prompt's broken end, which is the first character if it comes at all."""
        if self._borrowed and text:
            self._borrowed = False
            return text.removeprefix("\ufffd")
        return text
