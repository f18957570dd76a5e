"""What a kernel is made of, as a hash: its source, that of all it calls, and the values that these refer to.

Triton's own ``cache_key`` covers sources and the ``constexpr`` globals that are used by their bare names. It leaves out
constants reached through a module (``columns.LENGTH``), default values of the functions called, and global types
(``WIDE = tl.float32``). Here both go into the hash, so that whatever changes what is compiled changes the key. What
comes with Triton itself is left to the key of the tool chain.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any

from triton.runtime.jit import JITCallable

from jitgraph.jit.canonical import canonical

_ABSENT = object()


@cache
def source_digest(function: Any) -> bytes:
    """SHA-256 over everything that a ``triton.jit`` function consists of, as it is at the first call."""
    digest = hashlib.sha256(canonical(function.cache_key))
    for reached in _functions(function):
        facts = (reached.fn.__module__, reached.fn.__qualname__, reached.src)
        digest.update(canonical(facts))
        for name, value in (*_defaults(reached), *_references(reached)):
            digest.update(canonical((name, _content(value))))
    return digest.digest()


def _functions(function: Any) -> Iterator[Any]:
    """A function and all that it calls, directly or not, each once."""
    seen, waiting = {id(function)}, [function]
    while waiting:
        reached = waiting.pop(0)
        yield reached
        for _, value in _references(reached):
            if isinstance(value, JITCallable) and id(value) not in seen and not _of_triton(value):
                seen.add(id(value))
                waiting.append(value)


def _defaults(function: Any) -> list[tuple[str, object]]:
    parameters = inspect.signature(function.fn).parameters.values()
    return [(p.name, p.default) for p in parameters if p.default is not inspect.Parameter.empty]


def _references(function: Any) -> list[tuple[str, object]]:
    """(dotted name, value) of everything outside a function that its source may refer to, in the order of the source.

    A local variable may hide a global one of its name; that one is then listed without need, which is harmless.
    """
    scope = function.fn.__globals__ | inspect.getclosurevars(function.fn).nonlocals
    found: dict[str, object] = {}
    for node in ast.walk(ast.parse(function.src)):
        dotted = _dotted(node)
        value = _resolve(dotted, scope) if dotted else _ABSENT
        if value is not _ABSENT and not isinstance(value, ModuleType):
            found[".".join(dotted)] = value
    return list(found.items())


def _dotted(node: ast.AST) -> list[str]:
    """``["a", "b"]`` for the expression ``a.b``; empty for any other."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return [node.id, *parts] if isinstance(node, ast.Name) else []


def _resolve(dotted: list[str], scope: dict[str, Any]) -> object:
    """The value of a name, followed through modules and no other objects."""
    value = scope.get(dotted[0], _ABSENT)
    for name in dotted[1:]:
        if not isinstance(value, ModuleType):
            return _ABSENT
        value = getattr(value, name, _ABSENT)
    return value


def _content(value: object) -> object:
    """What of a value is compiled in, as something that ``canonical`` takes."""
    if isinstance(value, JITCallable):
        return (value.fn.__module__, value.fn.__qualname__)
    try:
        canonical(value)
    except TypeError:  # a function or class: Triton's own, or nothing that a kernel can use
        return (type(value).__module__, type(value).__qualname__, getattr(value, "__qualname__", None))
    return value


def _of_triton(value: Any) -> bool:
    return str(value.fn.__module__).split(".")[0] == "triton"
