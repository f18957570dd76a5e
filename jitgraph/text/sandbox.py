"""The sandbox of chat templates: jinja2's immutable one, and no single operation that is long or large. No torch.

A template is foreign code. Whoever renders it can end it between two steps of Python, but not inside one operation of
the interpreter, so each of those is bounded here: products, powers, sums of texts, paddings, replacements, formats. Any
thread.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_REPEATED_ITEMS = 1_000_000
"""Most items of a repeated sequence, and the largest number that an operation on texts or a filter takes."""
MAX_TEXT_CHARS = 16_000_000
"""Longest text that one operation may make, far above any model's context."""
_MAX_NUMBER_BITS = 4096
_WIDE_PERCENT = re.compile(r"%[^a-zA-Z%]*(\d{7}|\*)")
_WIDE_BRACES = re.compile(r"\{[^{}]*(\d{7}|:[^{}]*\{)")
"""Widths of seven digits in formats, or of what is given with the values."""
_REMOVED_FILTERS = ("urlize", "wordwrap", "striptags")
"""Their regular expressions take a time that grows with the square of a text's length."""
_SIZED_FILTERS = ("batch", "center", "format", "indent", "join", "replace", "slice", "tojson", "truncate")


def _refuse_numbers(args: Iterable[Any]) -> None:
    for value in args:
        if isinstance(value, int) and abs(value) > MAX_REPEATED_ITEMS:
            raise SecurityError(f"a size of over {MAX_REPEATED_ITEMS}")


def _refuse_length(length: int) -> None:
    if length > MAX_TEXT_CHARS:
        raise SecurityError(f"a text of over {MAX_TEXT_CHARS} characters")


def _check_replaced(text: str, old: Any, new: Any) -> None:
    if isinstance(old, str) and isinstance(new, str):
        _refuse_length(len(text) + text.count(old) * len(new))


def _check_joined(separator: str, items: Any) -> list[Any]:
    """The items, which may come from a generator; their texts together are within the limit."""
    found, length = [], 0
    for item in items:
        length += len(separator) + (len(item) if isinstance(item, str) else 0)
        _refuse_length(length)
        found.append(item)
    return found


def _check_format(widths: re.Pattern[str], text: str) -> None:
    if widths.search(text):
        raise SecurityError("a format with a width that is very large or is a value itself")


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of jinja2 with limits on what it is given; those that want the environment get it first."""

    @wraps(function)  # keeps the marks by which jinja2 knows what to pass
    def bounded(*args: Any, **kwargs: Any) -> Any:
        plain = args[1:] if hasattr(function, "jinja_pass_arg") else args
        if name == "format" and plain:  # its numbers are values; sizes stand in its text
            _check_format(_WIDE_PERCENT, str(plain[0]))
        else:
            _refuse_numbers((*plain[1:], *kwargs.values()))
        if name == "replace" and plain:
            old, new = (*plain[1:3], kwargs.get("old"), kwargs.get("new"))[:2]
            _check_replaced(str(plain[0]), old, kwargs.get("new", new))
        if name == "join" and plain and not isinstance(plain[0], str):
            separator = plain[1] if len(plain) > 1 else kwargs.get("d", "")
            items = _check_joined(str(separator), plain[0])
            args = (*args[: len(args) - len(plain)], items, *plain[1:])
        if name == "indent" and plain:
            width = kwargs.get("width", plain[1] if len(plain) > 1 else 4)
            step = len(width) if isinstance(width, str) else width
            _refuse_length(str(plain[0]).count("\n") * int(step))
        return function(*args, **kwargs)

    return bounded


class _CodeGenerator(CodeGenerator):
    """Lets the operator ``~`` go through the sandbox."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concatenated((")
        for arg in node.nodes:
            self.visit(arg, frame)
            self.write(", ")
        self.write("))")


class Sandbox(ImmutableSandboxedEnvironment):
    """Raises ``SecurityError`` for what could take long or fill the memory in one operation."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})
    code_generator_class = _CodeGenerator

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name in _REMOVED_FILTERS:
            self.filters.pop(name, None)
        self.globals.pop("lipsum", None)

    def bound_filters(self) -> None:
        """To be called when all filters are there."""
        for name in _SIZED_FILTERS:
            self.filters[name] = _bounded_filter(name, self.filters[name])

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            _check_product(left, right)
        elif operator == "+":
            if isinstance(left, str) and isinstance(right, str):
                _refuse_length(len(left) + len(right))
        elif operator == "%":
            if isinstance(left, str):
                _check_format(_WIDE_PERCENT, left)
        elif isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > _MAX_NUMBER_BITS:
            raise SecurityError(f"a power of over {_MAX_NUMBER_BITS} bits")
        return super().call_binop(context, operator, left, right)

    def concatenated(self, parts: Sequence[Any]) -> str:
        """The operator ``~``."""
        texts = [part if isinstance(part, str) else str(part) for part in parts]
        _refuse_length(sum(map(len, texts)))
        return str_join(texts)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        text = getattr(value, "__self__", None)
        if isinstance(text, str) and getattr(value, "__name__", "") in ("format", "format_map"):
            _check_format(_WIDE_BRACES, text)
        return super().wrap_str_format(value)

    def call(self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        text = getattr(__obj, "__self__", None)
        if isinstance(text, (str, bytes)):
            args = self._checked_call(text, getattr(__obj, "__name__", ""), args, kwargs)
        elif __obj is str.join or __obj is str.format:
            raise SecurityError("a method of texts without its text")
        return super().call(__context, __obj, *args, **kwargs)

    def _checked_call(self, text: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """A method of a text: the arguments to call it with."""
        _refuse_numbers((*args, *kwargs.values()))
        if not isinstance(text, str):
            return args
        if name == "expandtabs":
            size = args[0] if args else kwargs.get("tabsize", 8)
            _refuse_length(text.count("\t") * int(size))
        elif name == "replace" and len(args) > 1:
            _check_replaced(text, args[0], args[1])
        elif name == "join" and args:
            return (_check_joined(text, args[0]), *args[1:])
        elif name == "translate" and args and isinstance(args[0], dict):
            longest = max((len(value) for value in args[0].values() if isinstance(value, str)), default=1)
            _refuse_length(len(text) * longest)
        return args


def _check_product(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > _MAX_NUMBER_BITS:
            raise SecurityError(f"a product of over {_MAX_NUMBER_BITS} bits")
        return
    for items, count in ((left, right), (right, left)):
        sized = isinstance(items, (str, bytes, list, tuple)) and isinstance(count, int)
        if sized and len(items) * count > MAX_REPEATED_ITEMS:
            raise SecurityError(f"a sequence repeated to over {MAX_REPEATED_ITEMS} items")
