"""A request's fields to what the engine understands: sampling parameters, grammars, seeds. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from jitgraph.errors import RequestError
from jitgraph.ipc.messages import EngineFacts, Grammar
from jitgraph.server.openai.decode import decode_raw, is_null
from jitgraph.server.openai.errors import ApiError, bad_request, from_user_error, too_long
from jitgraph.server.openai.limits import stops_of
from jitgraph.server.openai.schema import ResponseFormat, Sampled, StructuredOutputs
from jitgraph.server.settings import ServerSettings
from jitgraph.server.texts import TextTooLong
from jitgraph.types import SamplingParams

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1
_SPECIAL = re.compile(r"[\\.+*?()|\[\]{}^$#&~-]")
"""Characters with a meaning in a regular expression; a backslash before others may give them one."""
_GIVEN = (
    *("temperature", "top_p", "top_k", "min_p"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty"),
    *("min_tokens", "ignore_eos"),
)


def sampling_params(request: Sampled, facts: EngineFacts, max_tokens: int, logprobs: int | None) -> SamplingParams:
    """What the request asks for; the model's own settings stand for what it leaves out.

    Raises:
        ApiError: 400, naming the field.
    """
    given: dict[str, Any] = {name: getattr(request, name) for name in _GIVEN if getattr(request, name) is not None}
    if request.top_k == -1:
        given["top_k"] = 0  # off, in vLLM's word
    if request.logit_bias is not None:
        given["logit_bias"] = _biases(request.logit_bias, facts.vocab_size)
    if request.stop_token_ids is not None:
        check_ids("stop_token_ids", request.stop_token_ids, facts.vocab_size)
        given["stop_token_ids"] = tuple(request.stop_token_ids)
    if request.seed is not None:
        if not -(2**63) <= request.seed <= _MASK:
            raise bad_request("seed must be a whole number of 64 bits", "seed", "invalid_value")
        given["seed"] = request.seed & _MASK
    given["stop"] = stops_of(request)
    given.setdefault("min_tokens", 0)
    try:
        return replace(facts.default_params, max_tokens=max_tokens, logprobs=logprobs, **given)
    except RequestError as error:
        raise from_user_error(error) from None


def check_ids(param: str, ids: Sequence[int], vocabulary: int) -> None:
    """Refuses token ids that the model does not have.

    Raises:
        ApiError: 400, naming ``param``.
    """
    if ids and not (min(ids) >= 0 and max(ids) < vocabulary):
        wrong = next(i for i in ids if not 0 <= i < vocabulary)
        raise bad_request(f"{param}: {wrong} is not in the vocabulary of {vocabulary} entries", param, "invalid_value")


def _biases(given: Mapping[str, float], vocabulary: int) -> dict[int, float]:
    found = {}
    for token, bias in given.items():
        if not (token.isascii() and token.isdigit() and len(token) <= 10):
            raise bad_request(f"logit_bias: {token!r:.40} is no token id", "logit_bias", "invalid_value")
        found[int(token)] = bias
    check_ids("logit_bias", list(found), vocabulary)
    return found


def seed_of_answer(seed: int | None, answer: int) -> int | None:
    """The seed of the n-th answer to a prompt: the first has the request's own, so that ``n`` does not change it."""
    if seed is None or answer == 0:
        return seed
    mixed = (seed + answer * _GOLDEN) & _MASK  # SplitMix64's output function, Steele, Lea, Flood, OOPSLA 2014
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return mixed ^ (mixed >> 31)


def room_for(
    prompt_tokens: int, asked: int | None, default: int | None, facts: EngineFacts, caps: ServerSettings, param: str
) -> int:
    """Most tokens of an answer: as asked, else ``default`` or the rest of the context. Nothing is ever cut off.

    Raises:
        ApiError: 400 ``context_length_exceeded``; prompt and answer do not fit together.
    """
    limit = facts.max_model_len
    if limit is None:
        return asked or default or caps.max_tokens_rolling
    rest = limit - prompt_tokens
    if rest < 1 or (asked is not None and asked > rest):
        wanted = f" ({prompt_tokens} in the prompt, {asked} in the answer)" if asked is not None and rest > 0 else ""
        requested = prompt_tokens + (asked or 1)
        less = " or ask for fewer tokens" if asked is not None else ""
        raise too_long(limit, f"{requested} tokens were requested{wanted}", param, less)
    return asked or min(default or rest, rest)


def prompt_error(error: Exception, facts: EngineFacts, param: str) -> ApiError:
    """What was wrong with a prompt while it became token ids."""
    if isinstance(error, TextTooLong):
        return too_long(facts.max_model_len, str(error), param)
    return from_user_error(error, param)


def grammar_of(request: Sampled, caps: ServerSettings) -> Grammar | None:
    """What the answer must look like, from ``response_format`` or ``structured_outputs``.

    Raises:
        ApiError: 400, naming the field.
    """
    shaped = None if request.response_format is None else _of_format(request.response_format, caps)
    if request.structured_outputs is None:
        return shaped
    if shaped is not None:
        raise bad_request(
            "structured_outputs and response_format exclude each other: send one", "structured_outputs", "invalid_value"
        )
    return _of_structure(request.structured_outputs, caps)


def _of_format(form: ResponseFormat, caps: ServerSettings) -> Grammar | None:
    where = "response_format.json_schema"
    if form.type != "json_schema":
        if form.json_schema is not None:
            raise bad_request(f"{where} belongs to the type json_schema", where, "invalid_value")
        return Grammar("json_object") if form.type == "json_object" else None
    if form.json_schema is None:
        raise bad_request(f"{where} is missing", where, "missing_required_parameter")
    return _schema(form.json_schema.schema, f"{where}.schema", caps)


def _schema(raw: msgspec.Raw, where: str, caps: ServerSettings) -> Grammar:
    schema = decode_raw(raw, where, caps.max_schema_bytes, caps.max_schema_depth)
    if not isinstance(schema, (dict, bool)):
        raise bad_request(f"{where} must be a JSON schema, which is an object", where, "invalid_type")
    return Grammar("json_schema", bytes(raw).decode())


def _of_structure(form: StructuredOutputs, caps: ServerSettings) -> Grammar:
    given = {
        "json": not is_null(form.json),
        "json_object": bool(form.json_object),
        "regex": form.regex is not None,
        "choice": form.choice is not None,
        "grammar": form.grammar is not None,
    }
    named = [name for name, there in given.items() if there]
    if len(named) != 1:
        raise _one_of(*given)
    if named == ["json"]:
        return _schema(form.json, "structured_outputs.json", caps)
    if named == ["json_object"]:
        return Grammar("json_object")
    if form.choice is not None:
        kind, source = "regex", _one_of_texts(form.choice)
    else:
        kind, source = ("regex", form.regex) if form.regex is not None else ("lark", form.grammar or "")
    if not source or len(source) > caps.max_schema_bytes:
        where = f"structured_outputs.{named[0]}"
        raise bad_request(f"{where} must have 1 to {caps.max_schema_bytes} characters", where, "invalid_value")
    return Grammar(kind, source)


def _one_of_texts(texts: Sequence[str]) -> str:
    """A regular expression for one of these; empty where there are none, or one is empty."""
    if not texts or not all(texts):
        return ""
    return "|".join(_SPECIAL.sub(r"\\\g<0>", text) for text in texts)


def _one_of(*names: str) -> ApiError:
    return bad_request(
        f"structured_outputs must have exactly one of {', '.join(names)}", "structured_outputs", "invalid_value"
    )
