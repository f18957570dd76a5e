"""The disk cache: whatever happens to a file, the payload that comes back is the one that was stored, or none."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jitgraph.jit import disk_cache
from jitgraph.jit.disk_cache import DiskCache, Lookup, open_cache

KEY, OTHER = hashlib.sha256(b"a").digest(), hashlib.sha256(b"b").digest()
PAYLOAD = b"\x7fELF" + bytes(range(60))
HEADER = 8 + 4 + 32 + 8 + 32


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    return DiskCache(tmp_path / "kernels")


def heals(cache: DiskCache) -> None:
    """The entry of ``KEY`` counts as damaged, and storing it again mends it."""
    assert cache.get(KEY) == (Lookup.DAMAGED, b"")
    assert cache.put(KEY, PAYLOAD)
    assert cache.get(KEY) == (Lookup.HIT, PAYLOAD)


def test_stores_replaces_and_keeps_apart(cache: DiskCache) -> None:
    assert cache.get(KEY) == (Lookup.MISSING, b"")
    assert cache.put(KEY, b"first") and cache.put(KEY, PAYLOAD) and cache.put(OTHER, b"")
    assert cache.get(KEY) == (Lookup.HIT, PAYLOAD)
    assert cache.get(OTHER) == (Lookup.HIT, b"")
    assert sorted(path.name for path in cache.folder.iterdir()) == sorted(cache.path(key).name for key in (KEY, OTHER))


def test_every_truncation_is_found(cache: DiskCache) -> None:
    cache.put(KEY, PAYLOAD)
    whole = cache.path(KEY).read_bytes()
    assert len(whole) == HEADER + len(PAYLOAD)
    for length in range(len(whole)):
        cache.path(KEY).write_bytes(whole[:length])
        heals(cache)


def test_every_flipped_byte_is_found(cache: DiskCache) -> None:
    cache.put(KEY, PAYLOAD)
    whole = cache.path(KEY).read_bytes()
    for place in range(len(whole)):
        for bit in (0x01, 0x80):
            damaged = bytearray(whole)
            damaged[place] ^= bit
            cache.path(KEY).write_bytes(damaged)
            heals(cache)


@pytest.mark.parametrize("extra", [b"\0", b"x" * 4096])
def test_what_is_appended_is_found(cache: DiskCache, extra: bytes) -> None:
    cache.put(KEY, PAYLOAD)
    cache.path(KEY).write_bytes(cache.path(KEY).read_bytes() + extra)
    heals(cache)


def test_a_sound_entry_under_the_wrong_name_is_found(cache: DiskCache) -> None:
    cache.put(OTHER, b"somebody else's kernel")
    os.rename(cache.path(OTHER), cache.path(KEY))
    heals(cache)


def test_an_entry_of_another_format_is_found(cache: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as older:
        older.setattr(disk_cache, "CACHE_FORMAT", disk_cache.CACHE_FORMAT + 1)
        cache.put(KEY, PAYLOAD)
        assert cache.get(KEY) == (Lookup.HIT, PAYLOAD)
    heals(cache)


@pytest.mark.parametrize("foreign", [b"", b"hello", b"\x80\x04\x95", bytes(HEADER), bytes(10_000)])
def test_a_foreign_file_is_found(cache: DiskCache, foreign: bytes) -> None:
    cache.folder.mkdir(parents=True)
    cache.path(KEY).write_bytes(foreign)
    heals(cache)


@given(payload=st.binary(max_size=300), change=st.binary(min_size=1, max_size=20), place=st.integers(0, 400))
def test_nothing_but_the_stored_payload_comes_back(
    tmp_path_factory: pytest.TempPathFactory, payload: bytes, change: bytes, place: int
) -> None:
    cache = DiskCache(tmp_path_factory.getbasetemp() / "any")
    assert cache.put(KEY, payload) and cache.get(KEY) == (Lookup.HIT, payload)
    content = bytearray(cache.path(KEY).read_bytes())
    content[place : place + len(change)] = change
    cache.path(KEY).write_bytes(content)
    assert cache.get(KEY) in ((Lookup.HIT, payload), (Lookup.DAMAGED, b""))


def test_things_that_are_no_files_do_no_harm(cache: DiskCache, tmp_path: Path) -> None:
    cache.folder.mkdir(parents=True)
    place = cache.path(KEY)
    os.mkfifo(place)
    heals(cache)  # a reader that opened the pipe would wait for ever
    place.unlink()
    place.symlink_to(tmp_path / "nowhere")
    assert cache.get(KEY) == (Lookup.MISSING, b"")
    assert cache.put(KEY, PAYLOAD) and not place.is_symlink() and cache.get(KEY) == (Lookup.HIT, PAYLOAD)
    place.unlink()
    place.mkdir()
    assert cache.get(KEY) == (Lookup.DAMAGED, b"")
    assert not cache.put(KEY, PAYLOAD), "a folder cannot be replaced by a file"
    assert list(cache.folder.iterdir()) == [place], "the attempt leaves nothing behind"


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = DiskCache(tmp_path / "file" / "kernels")
    assert cache.get(KEY) == (Lookup.MISSING, b"")
    assert not cache.put(KEY, PAYLOAD)
    assert cache.prune() == 0


@pytest.mark.parametrize("call", ["open", "replace"])
def test_a_disk_that_refuses_is_no_error(cache: DiskCache, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    cache.put(OTHER, PAYLOAD)

    def refuse(*args: object) -> None:
        raise OSError(errno.EROFS, "read-only")

    with monkeypatch.context() as broken:
        broken.setattr(disk_cache.os, call, refuse)
        assert not cache.put(KEY, PAYLOAD)
    assert [path.name for path in cache.folder.iterdir()] == [cache.path(OTHER).name]
    assert cache.get(OTHER) == (Lookup.HIT, PAYLOAD)


def test_a_disk_that_fills_up_leaves_no_half_entry(cache: DiskCache) -> None:
    script = (
        "import resource, sys; from jitgraph.jit.disk_cache import DiskCache\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        f"sys.exit(DiskCache({str(cache.folder)!r}).put({KEY!r}, bytes(10_000)))"
    )
    root = Path(__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", script], cwd=root).returncode == 0, "put must say False"
    assert list(cache.folder.iterdir()) == []


def test_leftovers_of_a_crash_are_ignored_and_swept(cache: DiskCache) -> None:
    cache.put(KEY, PAYLOAD)
    part = cache.path(KEY).read_bytes()[:50]
    young, old = (cache.folder / f".{OTHER.hex()}.{name}.tmp" for name in ("00", "11"))
    foreign = cache.folder / "notes.tmp"
    for path in (young, old, foreign):
        path.write_bytes(part)
    hours_ago = time.time() - 7200
    for path in (old, foreign):
        os.utime(path, (hours_ago, hours_ago))
    assert cache.get(OTHER) == (Lookup.MISSING, b"") and cache.get(KEY)[0] is Lookup.HIT
    cache.prune()
    assert young.exists() and not old.exists(), "another process may still be writing the young one"
    assert foreign.exists(), "what is not ours stays"


def _aged(cache: DiskCache, count: int, size: int) -> list[bytes]:
    """Keys of entries, the oldest first."""
    keys = [hashlib.sha256(bytes([number])).digest() for number in range(count)]
    for age, key in enumerate(reversed(keys)):
        assert cache.put(key, bytes(size))
        when = time.time() - 100 - age
        os.utime(cache.path(key), (when, when))
    return keys


def test_pruning_takes_what_was_not_used_for_longest(tmp_path: Path) -> None:
    keys = _aged(DiskCache(tmp_path), 10, 1000)
    (tmp_path / "foreign.kernel").write_bytes(bytes(50_000))
    assert DiskCache(tmp_path, limit_bytes=20_000).prune() == 0, "below the limit nothing goes"
    assert DiskCache(tmp_path).get(keys[0])[0] is Lookup.HIT, "used: it is the youngest now"
    assert DiskCache(tmp_path, limit_bytes=8_000).prune() == 5  # to three quarters of the limit, 1084 bytes each
    left = [key for key in keys if DiskCache(tmp_path).path(key).exists()]
    assert left == [keys[0], *keys[6:]]
    assert (tmp_path / "foreign.kernel").exists()


def test_writing_prunes_by_itself(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, limit_bytes=10_000)
    for number in range(50):
        assert cache.put(hashlib.sha256(bytes([number])).digest(), bytes(1000))
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 12_000
    assert cache.get(hashlib.sha256(bytes([49])).digest())[0] is Lookup.HIT


def test_many_processes_at_once(tmp_path: Path) -> None:
    """Writers, readers and pruners of the same few keys never see a damaged entry."""
    script = f"""
import hashlib, sys
from jitgraph.jit.disk_cache import DiskCache, Lookup
cache = DiskCache({str(tmp_path)!r}, limit_bytes=60_000)
hits = 0
for turn in range(400):
    number = (turn * int(sys.argv[1])) % 7
    key = hashlib.sha256(bytes([number])).digest()
    found, payload = cache.get(key)
    assert found is not Lookup.DAMAGED, (turn, number)
    assert found is Lookup.MISSING or payload == bytes([number]) * 10_000
    hits += found is Lookup.HIT
    if turn % 3 == 0:
        assert cache.put(key, bytes([number]) * 10_000)
print(hits)
"""
    command = [sys.executable, "-c", script]
    root = Path(__file__).parent.parent
    running = [
        subprocess.Popen([*command, step], cwd=root, stdout=subprocess.PIPE, text=True) for step in ("1", "3", "5")
    ]
    counts = [int(process.communicate()[0]) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert all(count > 0 for count in counts)
    assert not list(tmp_path.glob(".*"))


def test_the_users_cache_lies_below_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JITGRAPH_CACHE", str(tmp_path))
    assert open_cache().folder == tmp_path / "kernels"
    assert open_cache() is open_cache()
    monkeypatch.setenv("JITGRAPH_CACHE", str(tmp_path / "other"))
    assert open_cache().folder == tmp_path / "other" / "kernels"
