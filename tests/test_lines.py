"""Lines for people: nobody waits for whoever reads them, and what is lost is counted and told."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
from collections.abc import Iterator

import pytest

from jitgraph.lines import LineHandler, LineWriter

PATIENCE_S = 60.0


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A small one: its two ends."""
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    yield read, write
    for end in (read, write):
        with contextlib.suppress(OSError):
            os.close(end)


def read_until(end: int, last: str) -> str:
    text = ""
    while last not in text:
        text += os.read(end, 2**16).decode()
    return text


def test_lines_come_in_order_and_whole(pipe: tuple[int, int]) -> None:
    read, write = pipe
    say = LineWriter(write)
    for number in range(50):
        say(f"line {number}")
    say("half a pair: \ud800")
    assert say.flush(PATIENCE_S) and say.dropped == 0
    assert read_until(read, "pair").splitlines() == [*(f"line {n}" for n in range(50)), "half a pair: \\ud800"]


def test_nobody_waits_for_a_reader_that_does_not_come(pipe: tuple[int, int]) -> None:
    read, write = pipe
    say = LineWriter(write, most_waiting=10)
    for number in range(500):
        say(f"{number} " + "x" * 500)
    assert not say.flush(0.05)
    assert 400 < say.dropped < 500
    lost = say.dropped
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.append(read_until(read, "the last")))
    reader.start()
    assert say.flush(PATIENCE_S), "it goes on as soon as somebody reads"
    say("the last")
    reader.join(PATIENCE_S)
    lines = found[0].splitlines()
    told = [int(line[1:].split()[0]) for line in lines if "lines are missing here" in line]
    assert sum(told) == say.dropped == lost, "all of it is told, once"
    assert len(lines) == 500 - lost + len(told) + 1


def test_a_descriptor_that_never_blocks_is_waited_for(pipe: tuple[int, int]) -> None:
    read, write = pipe
    os.set_blocking(write, False)
    say = LineWriter(write)
    say("x" * 20_000)
    assert not say.flush(0.05)
    assert len(read_until(read, "\n")) == 20_001
    assert say.flush(PATIENCE_S) and say.dropped == 0


def test_a_reader_that_has_gone_costs_lines_and_nothing_else(pipe: tuple[int, int]) -> None:
    read, write = pipe
    os.close(read)
    say = LineWriter(write)
    for _ in range(3):
        say("to nobody")
    assert say.flush(PATIENCE_S) and say.dropped == 3


def test_log_records_are_lines(pipe: tuple[int, int]) -> None:
    read, write = pipe
    say = LineWriter(write)
    logger = logging.Logger("a.b")
    logger.addHandler(LineHandler(say))
    logger.info("not worth a line")
    try:
        raise ValueError("why")
    except ValueError:
        logger.exception("it failed")
    text = read_until(read, "ValueError: why")
    assert text.startswith("ERROR a.b: it failed\nTraceback")
