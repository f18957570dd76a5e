"""Bytes to records, with errors that name the field at fault. Pure."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec

from jitgraph.server.openai.errors import ApiError, bad_request, unsupported

T = TypeVar("T", bound=msgspec.Struct)

_MOST_CHARS = 300
_PLACE = re.compile(r" - at `(?:key in )?\$(.*)`$")
_UNKNOWN = re.compile(r"unknown field `(.*)`")
_MISSING = re.compile(r"missing required field `(.*)`")


def decoder_of(record: type[T]) -> msgspec.json.Decoder[T]:
    """A strict decoder: numbers are not taken from texts."""
    return msgspec.json.Decoder(record, strict=True)


def decode(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    """A request's record.

    Raises:
        ApiError: 400; no JSON, an unknown field, or a field of the wrong type, by its name.
    """
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _named(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise bad_request(f"the body is not valid JSON: {error}"[:_MOST_CHARS], None, "invalid_json") from None
    except RecursionError:
        raise bad_request("the body is nested too deeply", None, "invalid_json") from None
    except (ValueError, OverflowError) as error:  # a number that nothing can hold
        raise bad_request(f"the body is not valid: {error}"[:_MOST_CHARS], None, "invalid_json") from None


def _named(message: str) -> ApiError:
    place = _PLACE.search(message)
    where = place.group(1).lstrip(".") if place else ""
    what = message[: place.start()] if place else message
    for pattern, code in ((_UNKNOWN, "unknown_parameter"), (_MISSING, "missing_required_parameter")):
        named = pattern.search(what)
        if named:
            param = f"{where}.{named.group(1)}" if where else named.group(1)
            verb = "is not a field that this server knows" if pattern is _UNKNOWN else "is missing"
            return bad_request(f"{param} {verb}"[:_MOST_CHARS], param[:_MOST_CHARS], code)
    if what.startswith("Expected `null`"):
        return unsupported(where)
    return bad_request(f"{where or 'the body'}: {what}"[:_MOST_CHARS], where[:_MOST_CHARS] or None, "invalid_type")


def decode_raw(raw: msgspec.Raw, param: str, most_bytes: int, most_depth: int) -> Any:
    """A JSON value that was kept as bytes, within a size and a depth.

    Raises:
        ApiError: 400; too large, or nested too deeply.
    """
    if len(raw) > most_bytes:
        raise bad_request(f"{param} has {len(raw)} bytes; {most_bytes} are possible", param, "too_large")
    if _deeper_than(bytes(raw), most_depth):
        raise bad_request(f"{param} is nested more than {most_depth} levels deep", param, "too_deep")
    try:
        return msgspec.json.decode(raw)
    except (msgspec.MsgspecError, ValueError, OverflowError) as error:
        raise bad_request(f"{param} is not valid: {error}"[:_MOST_CHARS], param, "invalid_json") from None


_STRINGS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"')
_ONE_KIND = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def _deeper_than(text: bytes, most: int) -> bool:
    """Whether valid JSON is nested deeper, without decoding it, and in as few steps of Python as may be: everything but
    the brackets goes, then every innermost pair at once, level by level."""
    brackets = _STRINGS.sub(b"", text).translate(_ONE_KIND, _NO_BRACKETS)
    for _ in range(most):
        if not brackets:
            return False
        brackets = brackets.replace(b"[]", b"")
    return bool(brackets)


def is_null(raw: msgspec.Raw) -> bool:
    """Whether nothing stands there, or null."""
    return bytes(raw).strip() in (b"", b"null")
