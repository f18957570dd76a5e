"""Every record survives the way to the other process; parameters and ids are checked where they are unpacked."""

from __future__ import annotations

import math
import random
import tracemalloc
from dataclasses import fields
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reliability_parts.wire_values import CLIENT_RECORDS, ENGINE_RECORDS, PARAMS, random_record

from jitgraph.errors import RequestError
from jitgraph.ipc.frames import Framer, ProtocolError, client_framer, encode, engine_framer
from jitgraph.ipc.messages import (
    MAX_NAME_CHARS,
    MAX_PARAMS_BYTES,
    Beat,
    Drain,
    EngineFacts,
    Hello,
    Message,
    Ready,
    Submit,
    Tokens,
    WireLogprobs,
    pack_ids,
    pack_params,
    unpack_ids,
    unpack_params,
)
from jitgraph.types import MAX_SEED, SamplingParams

RANDOM = st.randoms(use_true_random=False)


def packed(values: Any) -> msgspec.Raw:
    """What a foreign client may send as parameters."""
    return msgspec.Raw(msgspec.msgpack.encode(values))


@pytest.mark.parametrize("kind", [*CLIENT_RECORDS, *ENGINE_RECORDS], ids=lambda kind: kind.__name__)
@settings(max_examples=60, deadline=None)
@given(rng=RANDOM)
def test_every_record_survives(kind: type[Message], rng: random.Random) -> None:
    record = random_record(rng, kind)
    frame = encode(record)
    framer: Framer[Message] = engine_framer() if kind in CLIENT_RECORDS else client_framer()
    (got,) = framer.feed(frame)
    assert type(got) is kind
    assert encode(got) == frame  # by bytes: a NaN does not equal itself
    assert not framer.partial


def test_every_record_belongs_to_one_direction() -> None:
    """A new record that is in neither union would never be read, and one in both would be ambiguous."""
    kinds = [kind for kind in Message.__subclasses__() if kind.__module__.startswith("jitgraph.")]
    assert sorted(kinds, key=str) == sorted([*CLIENT_RECORDS, *ENGINE_RECORDS], key=str)


def test_values_arrive_as_they_were() -> None:
    tokens = Tokens(
        2**40, (1, 2), (10, 20), (WireLogprobs(1, -0.5, ((1, -0.5), (7, -math.inf))),), "stop", 3, 4, 5, (None,)
    )
    facts = EngineFacts(1, "tiny", None, 512, None, 8, (0, 2), PARAMS[1], "cpu", "float32", "abc", True)
    ready = Ready(facts, {"load": 0.5}, {"load": 12.0})
    beat = Beat(2**62, 1, 2, 3, 4, 5)
    assert list(client_framer().feed(encode(tokens) + encode(ready) + encode(beat))) == [tokens, ready, beat]
    submit = Submit(7, pack_ids([1, 2**31 - 1]), pack_params(PARAMS[3]), "salt", 0)
    (got,) = engine_framer().feed(encode(submit))
    assert isinstance(got, Submit)
    assert (unpack_ids(got.prompt), unpack_params(got.params)) == ((1, 2**31 - 1), PARAMS[3])
    assert (got.salt, got.prompt_logprobs, got.grammar) == ("salt", 0, None)


@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=50))
def test_ids_survive_as_little_endian_words(ids: list[int]) -> None:
    data = pack_ids(ids)
    assert data == b"".join(token.to_bytes(4, "little", signed=True) for token in ids)
    assert unpack_ids(data) == tuple(ids)


@pytest.mark.parametrize(
    ("ids", "error"),
    [([2**31], OverflowError), ([-(2**31) - 1], OverflowError), ([1.5], TypeError), (["1"], TypeError)],
)
def test_what_is_no_id_is_refused(ids: list[Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        pack_ids(ids)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 4097])
def test_half_an_id_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="multiple"):
        unpack_ids(b"\0" * length)


@settings(deadline=None)
@given(
    st.builds(
        SamplingParams,
        max_tokens=st.integers(10, 2**31 - 1),
        min_tokens=st.integers(0, 10),
        temperature=st.floats(0, 100),
        top_k=st.integers(0, 2**31 - 1),
        top_p=st.floats(0, 1, exclude_min=True),
        min_p=st.floats(0, 1),
        repetition_penalty=st.floats(0.01, 10),
        presence_penalty=st.floats(-2, 2),
        frequency_penalty=st.floats(-2, 2),
        logit_bias=st.dictionaries(st.integers(0, 2**31 - 1), st.floats(-100, 100), max_size=5),
        seed=st.none() | st.integers(0, MAX_SEED),
        stop=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), max_size=4).map(tuple),
        stop_token_ids=st.lists(st.integers(0, 2**31 - 1), max_size=4).map(tuple),
        ignore_eos=st.booleans(),
        logprobs=st.none() | st.integers(0, 20),
    )
)
def test_parameters_survive(params: SamplingParams) -> None:
    got = unpack_params(pack_params(params))
    assert got == params
    assert got.kernel_floats == params.kernel_floats


OUT_OF_RANGE: list[dict[str, Any]] = [
    {"max_tokens": 0},
    {"max_tokens": -1},
    {"max_tokens": 2**31},
    {"max_tokens": 2**64 - 1},
    {"min_tokens": -1},
    {"min_tokens": 129},
    {"temperature": -0.001},
    {"temperature": math.nan},
    {"temperature": math.inf},
    {"temperature": 100.5},
    {"top_k": -1},
    {"top_k": 2**31},
    {"top_p": 0.0},
    {"top_p": 1.5},
    {"top_p": math.nan},
    {"min_p": -0.1},
    {"min_p": 1.1},
    {"repetition_penalty": 0.0},
    {"repetition_penalty": 11.0},
    {"presence_penalty": 2.5},
    {"frequency_penalty": -math.inf},
    {"logit_bias": {1: 101.0}},
    {"logit_bias": {-1: 1.0}},
    {"logit_bias": {2**31: 1.0}},
    {"logit_bias": [[1, 1.0], [1, 2.0]]},
    {"logit_bias": dict.fromkeys(range(301), 1.0)},
    {"seed": -1},
    {"stop": [""]},
    {"stop_token_ids": [-1]},
    {"stop_token_ids": [2**31]},
    {"stop_token_ids": list(range(33))},
    {"logprobs": 21},
    {"logprobs": -1},
]
WRONG_TYPE: list[Any] = [
    None,
    [],
    b"",
    7,
    {"max_tokens": "5"},
    {"max_tokens": 1.5},
    {"max_tokens": True},
    {"temperature": "hot"},
    {"ignore_eos": 1},
    {"stop": "abc"},
    {"stop": [1]},
    {"logit_bias": 5},
    {"logit_bias": {"a": 1.0}},
    {"logit_bias": [[1]]},
    {"seed": 1.0},
    {1: 2},
]


@pytest.mark.parametrize("values", OUT_OF_RANGE, ids=lambda values: f"{values!r:.40}")
def test_a_value_out_of_range_refuses_the_request_alone(values: dict[str, Any]) -> None:
    """The record around the parameters is valid, so that the client keeps its connection."""
    submit = Submit(1, b"", packed(values))
    (got,) = engine_framer().feed(encode(submit))
    assert isinstance(got, Submit)
    (name,) = values
    with pytest.raises(RequestError, match=r"stop token id|stop string" if name.startswith("stop") else name):
        unpack_params(got.params)


@pytest.mark.parametrize("values", WRONG_TYPE, ids=lambda values: f"{values!r:.40}")
def test_a_value_of_the_wrong_type_refuses_the_request_alone(values: Any) -> None:
    (got,) = engine_framer().feed(encode(Submit(1, b"", packed(values))))
    assert isinstance(got, Submit)
    with pytest.raises(RequestError):
        unpack_params(got.params)


@pytest.mark.parametrize("data", [b"\xdd\xff\xff\xff\xff", b"\x81", b"\xc1", b"\x81\xa4stop\xdd\xff\xff\xff\xff", b""])
def test_parameters_that_are_no_msgpack_are_refused(data: bytes) -> None:
    with pytest.raises(RequestError):
        unpack_params(msgspec.Raw(data))


def test_huge_parameters_are_refused_before_they_are_read() -> None:
    entries = 3_000_000
    data = b"\x81\xaalogit_bias\xdd" + entries.to_bytes(4, "big") + b"\x92\x00\x00" * entries
    tracemalloc.start()
    try:
        with pytest.raises(RequestError, match=str(MAX_PARAMS_BYTES)):
            unpack_params(msgspec.Raw(data))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**20  # reading them takes some 350 MiB, and about a second
    with pytest.raises(RequestError, match="stop strings"):
        pack_params(SamplingParams(stop=("x" * MAX_PARAMS_BYTES,)))
    assert len(pack_params(PARAMS[3])) < MAX_PARAMS_BYTES // 8


def test_half_a_surrogate_pair_is_refused_by_its_sender() -> None:
    with pytest.raises(RequestError, match="Unicode"):
        pack_params(SamplingParams(stop=("\ud83d",)))
    with pytest.raises(ProtocolError, match="Submit"):
        encode(Submit(1, b"", pack_params(SamplingParams()), salt="\ud83d"))


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf, 1e9])
def test_a_drain_has_a_sensible_length(seconds: float) -> None:
    with pytest.raises(ProtocolError, match="timeout_s"):
        list(engine_framer().feed(encode(Drain(seconds))))
    assert list(engine_framer().feed(encode(Drain(30.0)))) == [Drain(30.0)]


def test_a_name_is_short() -> None:
    assert list(engine_framer().feed(encode(Hello(1, "é" * MAX_NAME_CHARS)))) == [Hello(1, "é" * MAX_NAME_CHARS)]
    with pytest.raises(ProtocolError, match="name"):
        list(engine_framer().feed(encode(Hello(1, "x" * (MAX_NAME_CHARS + 1)))))


def test_every_parameter_is_in_the_refusals() -> None:
    """A parameter added later needs its range tested here too."""
    named = {name for values in [*OUT_OF_RANGE, *WRONG_TYPE] if isinstance(values, dict) for name in values}
    assert {field.name for field in fields(SamplingParams)} <= named
