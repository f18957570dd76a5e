"""Makes Triton's interpreter quicker, and changes nothing else: most of its time went into looking for what to replace.

While a kernel runs, the built-in functions of ``triton.language`` are replaced, and for that the interpreter looks
through all members of its modules, at each launch and at each call of one function by another. Which names are built-in
never changes, and in a call from a kernel they are replaced already: so here the names are found once, and what is
replaced is left alone. ``test_quick_interpreter.py`` holds that against the interpreter's own way.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy
import triton
import triton.language as tl
from triton.runtime import interpreter

SUITS = triton.__version__.startswith("3.7.")
"""Whether this is the version whose interpreter this was written for; another one is left as it is."""
PACKAGES = (tl, tl.core, tl.tensor, tl.math, tl.core.tensor_descriptor_base) if SUITS else ()
"""The modules and classes whose members are replaced."""
_REPLACED_APART = ("reduce", "associative_scan")
"""Replaced in ``tl`` and ``tl.core`` at once, whichever of them a kernel sees: they do not tell for the others."""

_slow_numpy_type = getattr(interpreter, "_get_np_dtype", None)
_slow_call = interpreter.InterpretedFunction.__call__
_names: dict[int, list[str]] = {}
_packages: dict[Any, list[Any]] = {}
"""Of each function that another one calls, those of ``tl`` and ``tl.core`` that it sees."""
_numpy_types: dict[str, numpy.dtype[Any]] = {}


def builtin_names(package: Any) -> list[str]:
    """The members that the interpreter would replace now, first those that tell for the others."""
    found = [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]
    return sorted(found, key=lambda name: name in _REPLACED_APART)


def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    """In place of ``interpreter._patch_builtin``."""
    names = _names[id(package)]
    if not names or not tl.core.is_builtin(getattr(package, names[0])):
        return
    for name in names:
        member = getattr(package, name)
        if tl.core.is_builtin(member):
            interpreter._patch_attr(package, name, member, builder, scope)


def call(function: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of ``interpreter.InterpretedFunction.__call__``: a function that another one calls."""
    if function.fn not in _packages:
        members = list(function.fn.__globals__.values())
        _packages[function.fn] = [one for one in (tl, tl.core) if any(member is one for member in members)]
    if any(tl.core.is_builtin(getattr(package, _names[id(package)][0])) for package in _packages[function.fn]):
        interpreter._patch_lang(function.fn)
    try:
        return function.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


def numpy_type(dtype: Any) -> Any:
    """In place of ``interpreter._get_np_dtype``, which makes a table of all types for each answer."""
    scalar = dtype.element_ty if type(dtype) is tl.block_type else dtype
    if type(scalar) is not tl.dtype:
        return _slow_numpy_type(dtype)
    if scalar.name not in _numpy_types:
        _numpy_types[scalar.name] = _slow_numpy_type(scalar)
    return _numpy_types[scalar.name]


def install() -> None:
    """From now on this process's interpreter is quick, where it is the known one; before its first kernel."""
    if not SUITS:
        return
    _names.update({id(package): builtin_names(package) for package in PACKAGES})
    interpreter._patch_builtin = patch_builtin
    interpreter._get_np_dtype = numpy_type
    interpreter.InterpretedFunction.__call__ = call
