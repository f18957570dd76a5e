"""Tool calls in a model's text, found while it streams. Pure; one parser belongs to one answer, on the event loop.

What cannot be part of a call passes at once; what may be the beginning of one is held back, up to ``MOST_HELD_CHARS``.
Once the name is known and the arguments have begun they stream as they are, valid JSON or not, as with OpenAI. What
turns out to be no call before that comes out as the text it was. However the text is cut into pieces, the calls and
the text are the same.
"""

from __future__ import annotations

import json
import re
import string
from collections import deque
from collections.abc import Callable, Collection, Generator

from jitgraph.server.tool_forms import Delta, Form, TextDelta, ToolCallDelta, new_id

MOST_HELD_CHARS = 16_384
"""Most characters that are held back while it is not clear whether they are a call."""
MOST_CALLS = 128
"""Most calls of one answer; what would be a further one is text."""
NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
"""A function's name."""
_END = ""
_OUTSIDE_STRINGS = frozenset(string.ascii_letters + string.digits + "{}[]:,+-. \t\r\n")
_SPACE = frozenset(" \t\r\n")
_ARGUMENTS = ("arguments", "parameters")

Machine = Generator[None, str, None]
"""Wants characters, one at a time; ``_END`` is the end of the text."""


class _Malformed(Exception):
    """What began like a call is none."""


class ToolParser:
    """Takes an answer's text apart into text and calls.

    Args:
        form: how calls are written.
        names: functions that may be called; a call of another is text. None: any.
        most_calls: further calls are text.
        make_id: where ids come from.
    """

    def __init__(
        self,
        form: Form,
        names: Collection[str] | None = None,
        most_calls: int = MOST_CALLS,
        make_id: Callable[[], str] | None = None,
    ) -> None:
        self._form = form
        self._names = None if names is None else frozenset(names)
        self._most_calls = most_calls
        self._make_id = make_id or (lambda: new_id(form.short_ids))
        self._out: list[Delta] = []
        self._parts: list[str] = []  # of the piece that is not in ``_out`` yet
        self._where = -1
        self._again: deque[str] = deque()  # characters that are read once more
        self._taken: list[str] = []  # characters of what may be a call, while ``_keeping``
        self._keeping = False
        self._plain = False  # between two characters of plain text, nothing held back
        self._first = frozenset(marker[0] for marker in form.markers)
        self.calls = 0
        """Calls so far."""
        self._machine = self._run()
        next(self._machine)

    def feed(self, text: str) -> list[Delta]:
        """What more of the answer's text brings: neighbouring pieces of one kind are one."""
        if self._plain and self._first.isdisjoint(text):
            return [TextDelta(text)] if text else []
        for char in text:
            self._machine.send(char)
        return self._flush()

    def finish(self) -> list[Delta]:
        """What was held back, at the end of the answer. Nothing may be fed afterwards."""
        try:
            self._machine.send(_END)
        except StopIteration:
            return self._flush()
        raise AssertionError("the end of the text did not end its parser")

    def _flush(self) -> list[Delta]:
        self._close()
        out, self._out = self._out, []
        return out

    # ------------------------------------------------------------------------------------------------------- the output

    def _give(self, where: int, text: str) -> None:
        """More of the text (``where`` is -1) or of a call's arguments."""
        if where != self._where:
            self._close()
            self._where = where
        self._parts.append(text)

    def _close(self) -> None:
        """The pieces given so far become one."""
        text = "".join(self._parts)
        self._parts.clear()
        if text:
            self._out.append(TextDelta(text) if self._where < 0 else ToolCallDelta(self._where, text))

    def _text(self, text: str) -> None:
        self._give(-1, text)

    def _begin(self, name: str) -> None:
        self._close()
        self._out.append(ToolCallDelta(self.calls, "", self._make_id(), name))
        self.calls += 1

    def _arguments(self, text: str) -> None:
        self._give(self.calls - 1, text)

    # ------------------------------------------------------------------------------------------------------ the reading

    def _next(self) -> Generator[None, str, str]:
        """The next character."""
        if self._again:
            char = self._again.popleft()
        else:
            char = yield
        if self._keeping:
            self._taken.append(char)
            if len(self._taken) > MOST_HELD_CHARS:
                raise _Malformed
        return char

    def _behind_space(self) -> Generator[None, str, str]:
        """The next character that is no white space."""
        while True:
            char = yield from self._next()
            if char not in _SPACE:
                return char

    def _put_back(self, skip: int = 0) -> str:
        """What was taken is read again, its first ``skip`` characters aside, which are returned."""
        taken = self._taken
        self._again.extendleft(reversed(taken[skip:]))
        skipped = "".join(taken[:skip])
        taken.clear()
        return skipped

    # ------------------------------------------------------------------------------------------------------ the grammar

    def _run(self) -> Machine:
        """Text, and calls in it. White space before and behind calls is not part of the text."""
        markers = self._form.markers
        space = held = ""  # white space that may lie before a call, and what may begin a marker
        fresh, bare = True, self._form.bare  # fresh: nothing but white space since the start or since a call
        while True:
            self._plain = not (fresh or held or self._again)
            char = yield from self._next()
            self._plain = False
            if char == _END:
                self._text(held and space + held if self.calls else space + held)
                return
            if fresh and not held and char in _SPACE and len(space) < MOST_HELD_CHARS:
                space += char
                continue
            held += char
            opening = held if held in markers else ""
            while held and not opening and not any(marker.startswith(held) for marker in markers):
                if held[0] in bare:
                    opening = held[0]
                    self._again.extendleft(reversed(held[1:]))
                else:
                    self._text(space + held[0])
                    space, held, fresh, bare = "", held[1:], False, ""
            if opening:
                self._taken[:] = opening
                fresh = yield from self._opened()
                if not fresh:
                    self._text(space + self._put_back(len(opening)))
                space = held = bare = ""

    def _opened(self) -> Generator[None, str, bool]:
        """All calls behind one opening, which stands in ``_taken``; False where the first is none."""
        self._keeping = True
        try:
            last = self._taken[-1]
            char = last if len(self._taken) == 1 else (yield from self._behind_space())
            listed = self._form.listed and char == "["
            if listed:
                char = yield from self._behind_space()
            yield from self._call(char)
            yield from self._further(listed)
            return True
        except _Malformed:
            return False
        finally:
            self._keeping = False

    def _further(self, listed: bool) -> Machine:
        """Calls that follow another directly, and the end of them. What is neither is read again as text."""
        form = self._form
        separator = "," if listed else form.separator
        try:
            while True:
                self._taken.clear()
                char = yield from self._behind_space()
                if listed and char == "]":
                    break
                if not listed and form.closing and char == form.closing[0]:
                    yield from self._expect(form.closing[1:])
                    break
                if not listed and not form.several:
                    raise _Malformed
                if separator:
                    if char != separator:
                        raise _Malformed
                    char = yield from self._behind_space()
                yield from self._call(char)
        except _Malformed:
            self._put_back()
        self._taken.clear()

    def _expect(self, text: str) -> Machine:
        for expected in text:
            if (yield from self._next()) != expected:
                raise _Malformed

    def _call(self, char: str) -> Machine:
        """An object with a name and arguments, from its brace. Raises while nothing of it has been given out."""
        if char != "{":
            raise _Malformed
        name: str | None = None
        arguments: str | None = None
        while True:
            key = yield from self._key()
            char = yield from self._behind_space()
            if key == "name" and name is None:
                name = yield from self._name(char)
            elif key in _ARGUMENTS and arguments is None:
                if name is not None and char == "{":
                    self._begin(name)
                    yield from self._stream_arguments()
                    return
                arguments = yield from self._whole_arguments(char)
            else:
                yield from self._value(char)
            if name is not None and arguments is not None:
                self._begin(name)
                self._arguments(arguments)
                yield from self._rest()
                return
            char = yield from self._behind_space()
            if char == "}" and name is not None and self._form.markers and not self._form.bare:
                self._begin(name)  # behind a marker, a name alone is a call without arguments
                self._arguments("{}")
                return
            if char != ",":
                raise _Malformed

    def _key(self) -> Generator[None, str, str]:
        if (yield from self._behind_space()) != '"':
            raise _Malformed
        key = yield from self._string()
        if (yield from self._behind_space()) != ":":
            raise _Malformed
        return key

    def _name(self, char: str) -> Generator[None, str, str]:
        name = (yield from self._string()) if char == '"' else ""
        known = self._names is None or name in self._names
        if not NAME.fullmatch(name) or not known or self.calls >= self._most_calls:
            raise _Malformed
        return name

    def _whole_arguments(self, char: str) -> Generator[None, str, str]:
        """Arguments before the name, or as a text that holds JSON, or none."""
        if char == '"':
            text = yield from self._string()
            if not _is_object(text):
                raise _Malformed
            return text
        begin = len(self._taken) - 1
        yield from self._value(char)
        if char == "{":
            return "".join(self._taken[begin:])
        if char == "n":
            return "{}"
        raise _Malformed

    def _stream_arguments(self) -> Machine:
        """The object of the arguments as it comes, and then the rest of the call."""
        self._keeping = False
        self._arguments("{")
        depth, quoted, escaped = 1, False, False
        while depth:
            char = yield from self._next()
            if char == _END or not (quoted or char == '"' or char in _OUTSIDE_STRINGS):
                self._again.appendleft(char)  # the arguments were cut short; what follows is no part of them
                break
            self._arguments(char)
            if quoted:
                quoted = escaped or char != '"'
                escaped = char == "\\" and not escaped
            else:
                quoted = char == '"'
                depth += (char in "{[") - (char in "}]")
        self._keeping = True
        if not depth:
            yield from self._rest()

    def _rest(self) -> Machine:
        """What a call has behind name and arguments, up to its brace. Where that is malformed, it is read again."""
        self._taken.clear()
        try:
            while (yield from self._behind_space()) == ",":
                yield from self._key()
                yield from self._value((yield from self._behind_space()))
            if self._taken[-1] != "}":
                raise _Malformed
        except _Malformed:
            self._put_back()

    def _value(self, char: str) -> Machine:
        """Any JSON value, from its first character; only as correct as it must be to find its end."""
        depth = 0
        while True:
            if char == '"':
                yield from self._string()
            elif char == _END or char not in _OUTSIDE_STRINGS:
                raise _Malformed
            depth += (char in "{[") - (char in "}]")
            if depth < 0 or (depth == 0 and char in ":,"):
                raise _Malformed
            if depth == 0 and (char.isalnum() or char == "-"):
                yield from self._literal()
            if depth == 0 and char not in _SPACE:
                return
            char = yield from self._next()

    def _literal(self) -> Machine:
        """The rest of a number or a word; the character that ends it is left."""
        while True:
            char = yield from self._next()
            if char == _END or not (char.isalnum() or char in "+-."):
                self._taken.pop()
                self._again.appendleft(char)
                return

    def _string(self) -> Generator[None, str, str]:
        """The rest of a JSON text behind its quote, decoded."""
        chars: list[str] = []
        escaped = False
        while True:
            char = yield from self._next()
            if char == _END:
                raise _Malformed
            if char == '"' and not escaped:
                break
            escaped = char == "\\" and not escaped
            chars.append(char)
        try:
            text: str = json.loads(f'"{"".join(chars)}"', strict=False)
            text.encode()  # half a surrogate pair cannot be sent on
        except ValueError:
            raise _Malformed from None
        return text


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
