"""Triton's own cache while we compile: ours is private, everybody else's stays what the user chose."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import triton
from triton.runtime.cache import FileCacheManager, get_cache_manager, get_dump_manager

from jitgraph.jit.private_cache import private_cache

KNOBS = triton.knobs.cache


class UsersCache(FileCacheManager):
    """A cache that a user gave Triton."""


class OtherCache(FileCacheManager):
    """Another one."""


@pytest.fixture(autouse=True)
def _own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("TRITON_DUMP_DIR", str(tmp_path / "dump"))
    before = dict(KNOBS.__dict__)
    yield
    KNOBS.__dict__.clear()
    KNOBS.__dict__.update(before)


def manager() -> object:
    return get_cache_manager("ab" * 32)


def elsewhere(work: Callable[[], object]) -> object:
    """What ``work`` gives on another thread."""
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


def test_a_block_has_an_empty_cache_of_its_own(tmp_path: Path) -> None:
    usual = manager()
    assert isinstance(usual, FileCacheManager)
    usual.put(b"stale", "kernel.cubin")
    usual.put_group("kernel.json", {"kernel.cubin": usual.get_file("kernel.cubin")})
    with private_cache():
        mine = manager()
        assert mine.get_group("kernel.json") is None and mine.get_file("kernel.cubin") is None
        path = Path(mine.put(b"fresh", "kernel.cubin"))
        assert path.read_bytes() == b"fresh" and mine.get_file("kernel.cubin") == str(path)
        assert Path(mine.put("text", "kernel.ptx")).read_text() == "text"
        mine.put_group("kernel.json", {"kernel.cubin": str(path)})
        assert mine.get_group("kernel.json") is None
        assert tmp_path not in path.parents
    assert not path.parent.exists()
    assert Path(usual.get_file("kernel.cubin")).read_bytes() == b"stale"


@pytest.mark.parametrize("chosen", [None, UsersCache])
def test_other_threads_and_later_compilations_see_the_users_choice(chosen: type | None) -> None:
    if chosen is not None:
        KNOBS.manager_class = chosen
    settings, environment = dict(KNOBS.__dict__), dict(os.environ)
    usual = chosen or FileCacheManager
    with private_cache():
        assert type(elsewhere(manager)) is usual
        with private_cache():
            pass
        assert type(manager()) is not usual, "an inner block ends without ending this one"
        assert type(get_dump_manager("ab" * 32)) is usual, "what the user dumps goes where the user wants it"
    assert type(manager()) is usual
    assert dict(KNOBS.__dict__) == settings and dict(os.environ) == environment


def test_a_choice_made_meanwhile_is_kept() -> None:
    with private_cache():
        KNOBS.manager_class = OtherCache
        with private_cache():
            assert type(manager()) is not OtherCache
        assert type(elsewhere(manager)) is OtherCache
    assert KNOBS.manager_class is OtherCache


def test_blocks_of_many_threads_overlap() -> None:
    both_open = threading.Barrier(2)
    folders = []

    def block() -> None:
        with private_cache():
            both_open.wait(10)
            folders.append(Path(manager().put(b"x", "kernel.cubin")).parent)
            both_open.wait(10)

    threads = [threading.Thread(target=block) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 2 and not any(folder.exists() for folder in folders)
    assert "manager_class" not in KNOBS.__dict__


def test_a_block_that_fails_cleans_up() -> None:
    with pytest.raises(KeyError), private_cache():
        raise KeyError
    assert "manager_class" not in KNOBS.__dict__ and isinstance(manager(), FileCacheManager)
