"""What callers may pass as prompts and sampling parameters, made definite. No torch."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from jitgraph.errors import RequestError
from jitgraph.types import SamplingParams

Prompt = str | Sequence[int]
"""A text, or a list of token ids (any whole numbers: NumPy's and one-dimensional tensors serve as well)."""


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt, or a list of them, as a list.

    Raises:
        RequestError: nothing there, or neither texts nor lists of whole numbers.
    """
    if isinstance(prompts, str):
        return [prompts]
    items = _items(prompts)
    if not items:
        raise RequestError("there is no prompt: give a text or a non-empty list of token ids")
    if not isinstance(items[0], str) and _is_whole(items[0]):
        return [token_ids(items)]
    return [item if isinstance(item, str) else token_ids(item) for item in items]


def token_ids(prompt: Any) -> tuple[int, ...]:
    """A prompt of token ids as plain integers; may be empty, which the engine refuses.

    Raises:
        RequestError: not a list, or something in it is not a whole number.
    """
    if type(prompt) in (list, tuple) and set(map(type, prompt)) == {int}:
        return tuple(prompt)  # the usual case, on the path to the first token
    items = _items(prompt)
    if not all(_is_whole(item) for item in items):
        raise RequestError("a prompt of token ids must be whole numbers only")
    return tuple(operator.index(item) for item in items)


def as_params(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int, default: SamplingParams
) -> list[SamplingParams]:
    """Sampling parameters for each of ``count`` prompts.

    Raises:
        RequestError: a list of another length.
    """
    if params is None:
        return [default] * count
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise RequestError(f"{len(params)} sampling parameters for {count} prompts: give one, or one for each prompt")
    return list(params)


def _items(value: Any) -> list[Any]:
    if hasattr(value, "tolist"):  # NumPy arrays and tensors
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes, bytearray)):
        raise RequestError(f"a prompt must be a text or a list of token ids, not {type(value).__name__}")
    return list(value)


def _is_whole(value: Any) -> bool:
    return not isinstance(value, bool) and hasattr(value, "__index__")
