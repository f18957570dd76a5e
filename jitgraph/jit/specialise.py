"""Which launches share one binary: the classes of argument that Triton compiles differently.

Pure: no compiler, no device. What always holds: arguments with equal tokens get equal signatures, constants and
divisibility hints, and those are the ones that Triton's own launcher derives (its rules: a pointer or an integer
divisible by 16 is marked so, the integer 1 and None become constants, an integer is i32, i64 or u64 by its value,
floats are fp32).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from jitgraph.errors import DeviceError

_ELEMENT_TYPES: Mapping[torch.dtype, str] = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.uint16: "u16",
    torch.uint32: "u32",
    torch.uint64: "u64",
    torch.bool: "u1",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
}

# Tokens: a Triton type, with this suffix where the value is divisible by 16; or one of the two folded constants.
DIVISIBLE = ":16"
ONE = "one"
NONE = "none"
_FOLDED: Mapping[str, int | None] = {ONE: 1, NONE: None}

UNREACHABLE = "a kernel was given a tensor in pageable CPU memory; move it to the GPU or pin it"

_ALIGNED = {dtype: f"*{name}{DIVISIBLE}" for dtype, name in _ELEMENT_TYPES.items()}
_UNALIGNED = {dtype: f"*{name}" for dtype, name in _ELEMENT_TYPES.items()}


@dataclass(frozen=True)
class Parameters:
    """The parameters of a kernel body, split into what is passed and what is compiled in."""

    signature: inspect.Signature
    names: tuple[str, ...]
    constexpr: tuple[bool, ...]
    runtime_names: frozenset[str]
    leading: int
    """Arguments up to the last one that is not a constexpr: these are passed by position."""

    @classmethod
    def of(cls, fn: Callable[..., Any]) -> Parameters:
        """Reads them from a body.

        Raises:
            TypeError: a star parameter, or an annotation other than ``tl.constexpr``.
        """
        signature = inspect.signature(fn)
        flags = []
        for param in signature.parameters.values():
            if param.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
                raise TypeError(f"kernel {fn.__qualname__} must list each parameter by name, {param} does not")
            text = "" if param.annotation is inspect.Parameter.empty else str(param.annotation)
            if text and "constexpr" not in text:
                raise TypeError(f"kernel {fn.__qualname__}: annotate {param.name} with tl.constexpr or not at all")
            flags.append(bool(text))
        names = tuple(signature.parameters)
        leading = max((i + 1 for i, flag in enumerate(flags) if not flag), default=0)
        runtime = frozenset(name for name, flag in zip(names, flags, strict=True) if not flag)
        return cls(signature, names, tuple(flags), runtime, leading)

    def positional(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same call with every runtime argument, defaults included, by position and the rest by keyword."""
        given = {name: value for name, value in kwargs.items() if name in self.names}
        bound = self.signature.bind(*args, **given)
        bound.apply_defaults()
        values = tuple(bound.arguments[name] for name in self.names)
        rest = dict(zip(self.names[self.leading :], values[self.leading :], strict=True))
        options = {name: value for name, value in kwargs.items() if name not in self.names}
        return values[: self.leading], rest | options


@dataclass(frozen=True)
class Specialisation:
    """What one binary is compiled for."""

    types: tuple[tuple[str, str], ...]
    """Parameter to Triton type, ``constexpr`` for constants; in order."""
    constants: tuple[tuple[int, Any], ...]
    """Parameter index to value."""
    divisible: tuple[int, ...]
    """Indices of the parameters known to be divisible by 16."""
    options: tuple[tuple[str, Any], ...]
    """Compiler options (``num_warps``, ``num_stages``, ...), sorted by name."""

    @property
    def key(self) -> tuple[Any, ...]:
        """Hashable; tells 1 from True and 1.0, which compile differently."""
        kinds = tuple(type(value) for _, value in self.constants + self.options)
        return (self.types, self.constants, self.divisible, self.options, kinds)

    @property
    def argument_types(self) -> tuple[str, ...]:
        """Types of the arguments that are passed at a launch."""
        return tuple(kind for _, kind in self.types if kind != "constexpr")

    def describe(self) -> str:
        """``x=*fp16:16, n=i32, BLOCK=64; num_warps=4``."""
        constants = dict(self.constants)
        parts = []
        for index, (name, kind) in enumerate(self.types):
            text = repr(constants[index]) if kind == "constexpr" else kind + DIVISIBLE * (index in self.divisible)
            parts.append(f"{name}={text}")
        return ", ".join(parts) + "; " + ", ".join(f"{name}={value!r}" for name, value in self.options)


def integer_token(value: int) -> str:
    """Class of an integer argument.

    Raises:
        OverflowError: outside 64 bits.
    """
    if value == 1:
        return ONE
    if -(2**31) <= value < 2**31:
        return "i32" if value & 15 else "i32:16"
    if -(2**63) <= value < 2**63:
        return "i64" if value & 15 else "i64:16"
    if 0 <= value < 2**64:
        return "u64" if value & 15 else "u64:16"
    raise OverflowError(f"a kernel argument must fit into 64 bits, {value} does not")


def pointer_token(tensor: torch.Tensor, address: int) -> str:
    """Class of a tensor argument by its element type and the alignment of its address.

    Raises:
        TypeError: an element type that Triton has no name for.
    """
    token = (_UNALIGNED if address & 15 else _ALIGNED).get(tensor.dtype)
    if token is None:
        raise TypeError(f"a kernel cannot take a tensor of {tensor.dtype}")
    return token


def scan(
    args: Sequence[Any], constexpr: Sequence[bool], on_device: bool, tokens: list[Any], values: list[int | float]
) -> None:
    """Appends each argument's token, and the value to pass where one is passed.

    ``on_device``: the launch is real, so every tensor must be one that the GPU can read.

    Raises:
        DeviceError: a tensor out of the GPU's reach.
        TypeError: an argument that is no tensor, number or None.
    """
    for arg, is_constant in zip(args, constexpr, strict=False):  # constants may follow by keyword
        if is_constant:
            tokens.append((type(arg), arg))
        elif isinstance(arg, torch.Tensor):
            address = arg.data_ptr()
            if on_device and not (arg.is_cuda or arg.is_pinned()):
                raise DeviceError(UNREACHABLE)
            tokens.append(pointer_token(arg, address))
            values.append(address)
        elif arg is None:
            tokens.append(NONE)
        elif isinstance(arg, bool):
            tokens.append("u1")
            values.append(arg)
        elif isinstance(arg, int):
            token = integer_token(arg)
            tokens.append(token)
            if token != ONE:
                values.append(arg)
        elif isinstance(arg, float):
            tokens.append("fp32")
            values.append(arg)
        else:
            raise TypeError(f"a kernel argument must be a tensor, number or None, not {type(arg).__name__}")


def specialise(params: Parameters, tokens: Sequence[Any], keywords: Mapping[str, Any]) -> Specialisation:
    """Turns a scanned call into what to compile.

    Raises:
        TypeError: a constexpr is missing.
    """
    types: list[tuple[str, str]] = []
    constants: list[tuple[int, Any]] = []
    divisible = []
    for index, name in enumerate(params.names):
        token = tokens[index] if index < len(tokens) else None
        if isinstance(token, str) and token not in _FOLDED:
            types.append((name, token.removesuffix(DIVISIBLE)))
            if token.endswith(DIVISIBLE):
                divisible.append(index)
            continue
        types.append((name, "constexpr"))
        if isinstance(token, str):
            constants.append((index, _FOLDED[token]))
        elif token is not None:
            constants.append((index, token[1]))
        else:
            constants.append((index, _constant(params, name, keywords)))
    options = tuple(sorted((name, value) for name, value in keywords.items() if name not in params.names))
    return Specialisation(tuple(types), tuple(constants), tuple(divisible), options)


def _constant(params: Parameters, name: str, keywords: Mapping[str, Any]) -> Any:
    """The value of a constexpr that was not passed by position."""
    if name in keywords:
        return keywords[name]
    default = params.signature.parameters[name].default
    if default is inspect.Parameter.empty:
        raise TypeError(f"the constexpr {name} is missing")
    return default
