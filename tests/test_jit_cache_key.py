"""Keys of compiled kernels: whatever changes what is compiled changes the key, and nothing else does."""

from __future__ import annotations

import importlib
import itertools
import struct
import sys
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import triton
import triton.language as tl
from hypothesis import assume, given
from hypothesis import strategies as st
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction

from jitgraph.jit import cache_key
from jitgraph.jit.cache_key import kernel_key, toolchain
from jitgraph.jit.canonical import canonical
from jitgraph.jit.disk_cache import DiskCache
from jitgraph.jit.source_digest import source_digest
from jitgraph.jit.specialise import Specialisation

Pair = namedtuple("Pair", "a b")

_SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.integers(), st.floats(), st.sampled_from([0.0, -0.0, 1.0, -1.0]),
    st.text(max_size=3), st.binary(max_size=3), st.sampled_from([tl.float16, tl.float32, tl.int1]),
)  # fmt: skip
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(
        st.tuples(inner), st.tuples(inner, inner), st.lists(inner, max_size=3), st.builds(Pair, inner, inner)
    ),
    max_leaves=6,
)


def typed(value: object) -> object:
    """A value in a form whose ``==`` also compares types and the bits of floats."""
    if isinstance(value, float):
        return ("float", struct.pack(">d", value))
    if isinstance(value, (tuple, list)):
        return (type(value).__qualname__, [typed(item) for item in value])
    return (type(value).__qualname__, str(value))


@given(_VALUES, _VALUES)
def test_canonical_bytes_differ_where_values_or_types_do(left: object, right: object) -> None:
    assert (canonical(left) == canonical(right)) == (typed(left) == typed(right))


@given(st.lists(_SCALARS, min_size=2, max_size=4))
def test_canonical_bytes_keep_the_shape(items: list[object]) -> None:
    """Nesting and neighbours cannot be confused."""
    shapes = [tuple(items), (tuple(items),), (*items, None), (tuple(items[:1]), *items[1:]), items]
    for left, right in itertools.combinations(shapes, 2):
        assert canonical(left) != canonical(right)


def test_canonical_bytes_of_tritons_values_and_of_strangers() -> None:
    assert canonical(tl.constexpr(3)) == canonical(tl.constexpr(3)) != canonical(3)
    assert canonical(tl.pointer_type(tl.float16)) != canonical(tl.pointer_type(tl.float32)) != canonical(tl.float32)
    assert canonical({"a": 1, "b": 2}) == canonical({"b": 2, "a": 1}) != canonical({"a": 2, "b": 1})
    for stranger in (object(), test_canonical_bytes_keep_the_shape, 1j, (1, object())):
        with pytest.raises(TypeError, match="cannot be part of a key"):
            canonical(stranger)


# ------------------------------------------------------------------------------------------------------ the whole key


def body(x, n, SIZE: tl.constexpr, FLAG: tl.constexpr):
    tl.store(x + n, SIZE)


FUNCTION = JITFunction(body)
SPEC = Specialisation(
    types=(("x", "*fp16"), ("n", "i32"), ("SIZE", "constexpr"), ("FLAG", "constexpr")),
    constants=((2, 64), (3, True)),
    divisible=(0,),
    options=(("num_warps", 4),),
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> DiskCache:
    return DiskCache(tmp_path_factory.mktemp("cache"))


def key_of(spec: Specialisation, cache: DiskCache, arch: int = 90, function: Any = FUNCTION) -> bytes | None:
    backend = make_backend(GPUTarget("cuda", arch, 32))
    return kernel_key(function, spec, backend, backend.parse_options(dict(spec.options)), cache)


def test_each_part_of_a_specialisation_counts(cache: DiskCache) -> None:
    constants = [((2, size), (3, flag)) for size in (64, 64.0, "64", True, 1, 1.0, None) for flag in (True, 1, 1.0)]
    constants += [((2, tl.float16), (3, True)), ((2, (1, 2)), (3, True)), ((2, 0.0), (3, 1)), ((2, -0.0), (3, 1))]
    options = [(), (("num_warps", 8),), (("num_stages", 4),), (("num_warps", 4), ("num_stages", 4)), (("maxnreg", 96),)]
    specs = [SPEC]
    specs += [replace(SPEC, constants=changed) for changed in constants if repr(changed) != repr(SPEC.constants)]
    specs += [replace(SPEC, options=changed) for changed in options]
    specs += [replace(SPEC, divisible=changed) for changed in ((), (1,), (0, 1))]
    specs += [replace(SPEC, types=(("x", kind), *SPEC.types[1:])) for kind in ("*fp32", "*bf16", "i64")]
    keys = [key_of(spec, cache) for spec in specs]
    assert None not in keys and len(set(keys)) == len(specs)
    assert key_of(SPEC, cache, arch=80) not in keys
    assert key_of(replace(SPEC), cache) == keys[0]


@given(left=st.tuples(_SCALARS, _SCALARS), right=st.tuples(_SCALARS, _SCALARS))
def test_equal_keys_mean_equal_constants(
    cache: DiskCache, left: tuple[object, object], right: tuple[object, object]
) -> None:
    assume(typed(left) != typed(right))
    keys = [key_of(replace(SPEC, constants=((2, pair[0]), (3, pair[1]))), cache) for pair in (left, right)]
    assert keys[0] != keys[1]


def test_what_no_key_can_hold_is_not_cached(cache: DiskCache) -> None:
    assert key_of(replace(SPEC, constants=((2, object()), (3, True))), cache) is None


@pytest.mark.parametrize("switch", ["override", "dump_ir", "always_compile"])
def test_triton_debugging_switches_bypass_the_cache(
    cache: DiskCache, switch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with triton.knobs.compilation.scope():
        setattr(triton.knobs.compilation, switch, True)
        assert key_of(SPEC, cache) is None
    assert key_of(SPEC, cache) is not None
    monkeypatch.setattr(triton.knobs.runtime, "add_stages_inspection_hook", lambda: None, raising=False)
    assert key_of(SPEC, cache) is None


# ------------------------------------------------------------------------------------------------------ the tool chain


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Each call of Triton's slow hash of itself adds to the list."""
    calls: list[str] = []
    monkeypatch.setattr(cache_key, "triton_key", lambda: calls.append("call") or "triton 1")
    cache_key._toolchain.cache_clear()
    yield calls
    cache_key._toolchain.cache_clear()


def test_the_tool_chains_hash_is_kept_and_checked(tmp_path: Path, counted: list[str]) -> None:
    def process() -> str:
        cache_key._toolchain.cache_clear()  # what another process would not have
        return toolchain(DiskCache(tmp_path))

    first = process()
    assert process() == first and len(counted) == 1
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(kept.read_bytes()[:-1] + b"\0")
    assert process() == first and len(counted) == 2, "damaged: computed again"
    assert process() == first and len(counted) == 2


def test_a_changed_triton_is_noticed(tmp_path: Path, counted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "triton"
    (package / "compiler").mkdir(parents=True)
    source = package / "compiler" / "compiler.py"
    source.write_text("a = 1\n")
    monkeypatch.setattr(cache_key, "triton", SimpleNamespace(__file__=str(package / "__init__.py")))
    cache = DiskCache(tmp_path / "cache")
    for turn, text in enumerate(["a = 1\n", "a = 2\n", "a = 2\nb = 3\n"]):
        source.write_text(text)
        cache_key._files_of_triton.cache_clear()
        toolchain(cache)
        assert len(counted) == turn + 1
    cache_key._files_of_triton.cache_clear()
    cache_key._toolchain.cache_clear()
    toolchain(cache)
    assert len(counted) == 3


@pytest.fixture(autouse=True)
def _fresh_file_list() -> Iterator[None]:
    yield
    cache_key._files_of_triton.cache_clear()


# ---------------------------------------------------------------------------------------------------------- the source

_CONSTANTS = "import triton.language as tl\nBARE = tl.constexpr({bare})\nPLAIN = {plain}\nDEFAULT = {default}\n"
_HELPER = """
from triton.runtime.jit import JITFunction as jit
import triton.language as tl
from {constants} import DEFAULT

@jit
def deep(x):
    return x {operator} 1

@jit
def helper(x, N: tl.constexpr = DEFAULT):
    return deep(x) + N
"""
_KERNEL = """
from triton.runtime.jit import JITFunction as jit
import triton.language as tl
import {constants} as constants
import {helper} as helpers
from {constants} import BARE
KIND = tl.{kind}
UNUSED = tl.constexpr({unused})

@jit
def kernel(x):
    value = helpers.helper(tl.load(x)).to(KIND)
    tl.store(x, value + BARE + constants.BARE + constants.PLAIN)
"""
_BASE = {"bare": "2", "plain": "3", "default": "4", "operator": "+", "kind": "float16", "unused": "5"}
_NUMBERS = itertools.count()


def load_kernel(folder: Path, **changes: str) -> Any:
    """The kernel of three fresh modules; the modules' names differ each time, so they are not part of the sources."""
    values = _BASE | changes
    number = next(_NUMBERS)
    names = {part: f"jit_key_{part}_{number}" for part in ("constants", "helper", "kernel")}
    for part, text in (("constants", _CONSTANTS), ("helper", _HELPER), ("kernel", _KERNEL)):
        (folder / f"{names[part]}.py").write_text(text.format(**values, **names))
    importlib.invalidate_caches()
    module = importlib.import_module(names["kernel"])
    for part in ("helper", "kernel"):  # functions are known by their module's name, which must not tell them apart here
        for value in vars(sys.modules[names[part]]).values():
            if isinstance(value, JITFunction):
                value.fn.__module__ = part
    return module.kernel


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"bare": "7"}, id="a constant"),
        pytest.param({"bare": "2.0"}, id="a constant's type"),
        pytest.param({"plain": "7"}, id="a plain value reached through a module"),
        pytest.param({"default": "7"}, id="a default of a function that is called"),
        pytest.param({"operator": "-"}, id="a function called by one that is called"),
        pytest.param({"kind": "float32"}, id="a type"),
    ],
)
def test_what_a_kernel_is_made_of_counts(folder: Path, change: dict[str, str]) -> None:
    assert source_digest(load_kernel(folder, **change)) != source_digest(load_kernel(folder))


def test_what_a_kernel_does_not_use_does_not_count(folder: Path) -> None:
    assert source_digest(load_kernel(folder, unused="7")) == source_digest(load_kernel(folder))
