"""Random records of the protocol between processes, from the records' own types, so that none can be forgotten."""

from __future__ import annotations

import random
from functools import cache
from typing import Any, get_args

import msgspec
from msgspec import inspect

from jitgraph.ipc.messages import FromClient, FromEngine, Message, pack_ids, pack_params
from jitgraph.types import SamplingParams

CLIENT_RECORDS: tuple[type[Message], ...] = get_args(FromClient)
ENGINE_RECORDS: tuple[type[Message], ...] = get_args(FromEngine)

INTEGERS = (0, 1, -1, 127, 128, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, -(2**31), 2**63 - 1, -(2**63), 2**64 - 1)
FLOATS = (0.0, -0.0, 1.0, -1.5, 1e-300, 1e300, float("inf"), float("-inf"), float("nan"))
TEXTS = ("", "a", "json_schema", "cancelled", "hällo", "漢字", "🙂", "\x00", "a" * 300, "\n{}[]")
PARAMS = (
    SamplingParams(),
    SamplingParams(temperature=0.7, top_p=0.9, top_k=40, min_p=0.05, seed=2**64 - 1, stop=("\n\n", "🙂")),
    SamplingParams(max_tokens=2**31 - 1, repetition_penalty=1.3, presence_penalty=-2.0, frequency_penalty=2.0),
    SamplingParams(logit_bias=dict.fromkeys(range(300), 0.5), stop_token_ids=tuple(range(32)), ignore_eos=True),
    SamplingParams(max_tokens=7, min_tokens=7, logprobs=20),
)


def random_record(rng: random.Random, kind: type[Message]) -> Message:
    """A valid record of this kind."""
    return kind(**{field.name: _field(rng, kind, field) for field in _fields(kind)})


@cache
def _fields(kind: type) -> tuple[inspect.Field, ...]:
    info = inspect.type_info(kind)
    assert isinstance(info, inspect.StructType)
    return info.fields


def _field(rng: random.Random, kind: type, field: inspect.Field) -> Any:
    if not field.required and rng.random() < 0.3:
        return field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
    if field.name == "prompt":
        return pack_ids([rng.randrange(-5, 2**31) for _ in range(rng.randrange(20))])
    if field.name == "params":
        return pack_params(rng.choice(PARAMS))
    return _value(rng, field.type)


def _value(rng: random.Random, kind: inspect.Type) -> Any:
    match kind:
        case inspect.UnionType(types=types):
            return _value(rng, rng.choice(types))
        case inspect.StructType(cls=cls):
            return cls(**{field.name: _field(rng, cls, field) for field in _fields(cls)})
        case inspect.DataclassType():
            return rng.choice(PARAMS)
        case inspect.FloatType(ge=least, le=most):
            drawn = rng.choice((*FLOATS, rng.uniform(-1e6, 1e6)))
            bounded = (least is None or drawn >= least) and (most is None or drawn <= most)
            return drawn if bounded else float(least or most or 0.0)
        case inspect.VarTupleType(item_type=item):
            return tuple(_value(rng, item) for _ in range(rng.choice((0, 1, 1, 2, 40))))
        case inspect.TupleType(item_types=items):
            return tuple(_value(rng, item) for item in items)
        case inspect.DictType(key_type=key, value_type=value):
            return {_value(rng, key): _value(rng, value) for _ in range(rng.randrange(5))}
    return _scalar(rng, kind)


def _scalar(rng: random.Random, kind: inspect.Type) -> Any:
    match kind:
        case inspect.IntType():
            return rng.choice((*INTEGERS, rng.randrange(-(2**40), 2**40)))
        case inspect.StrType(max_length=most):
            return rng.choice((*TEXTS, str(rng.random())))[:most]
        case inspect.BytesType():
            return rng.randbytes(rng.choice((0, 1, 4, 300)))
        case inspect.BoolType():
            return rng.random() < 0.5
        case inspect.NoneType():
            return None
        case inspect.AnyType():
            return loose_value(rng)
    raise TypeError(f"no random value for {kind}")


def loose_value(rng: random.Random, depth: int = 3) -> Any:
    """Anything that msgpack expresses, for fields of any type and for fields of the wrong type."""
    kind = rng.randrange(9 if depth else 7)
    if kind == 7:
        return [loose_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind == 8:
        return {rng.choice(TEXTS): loose_value(rng, depth - 1) for _ in range(rng.randrange(4))}
    scalars = (None, True, rng.choice(INTEGERS), rng.choice(FLOATS), rng.choice(TEXTS), rng.randbytes(3))
    return msgspec.msgpack.Ext(rng.randrange(-128, 128), rng.randbytes(4)) if kind == 6 else scalars[kind]
