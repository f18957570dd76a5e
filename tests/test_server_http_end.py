"""The end of the HTTP server itself: sudden or slow, it is quiet, and nobody waits for those who do not read."""

from __future__ import annotations

import logging
import signal
import socket

import pytest
from server_fakes import FakeEngine, Served, http_bytes, make_site, read_all, wait_until

from jitgraph.server.listen import HttpServer


def unread(served: Served) -> socket.socket:
    """A connection with an endless answer that nobody reads, stuck."""
    served._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # its connections have the same
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", served.port))
    connection.sendall(http_bytes("/v1/completions", {"prompt": "x", "stream": True, "max_tokens": 400}))
    engine = served.site.engine
    wait_until(lambda: engine.asked)
    before = -1
    while before != engine.asked[0].sent:  # it stands still
        before = engine.asked[0].sent
        served.post("/tokenize", {"prompt": "x"})
        wait_until(lambda: served.site.records)
    return connection


def endless() -> FakeEngine:
    engine = FakeEngine()
    engine.endless = lambda asked: [300] * 256
    return engine


def assert_quiet(caplog: pytest.LogCaptureFixture) -> None:
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("forced", [False, True])
def test_answers_that_nobody_reads_are_cut_off_quietly(caplog: pytest.LogCaptureFixture, forced: bool) -> None:
    site = make_site(endless())
    with caplog.at_level(logging.WARNING):
        with Served(site) as served:
            served.server._grace_s = None if forced else 0.2
            connection = unread(served)
            served.server.force_exit = forced
        connection.close()
    assert site.engine.asked[0].cancelled.is_set()
    assert [record.status for record in site.records if record.route == "/v1/completions"] == [200]
    assert_quiet(caplog)


def test_an_answer_under_way_is_finished_within_the_grace(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine()
    engine.pause_s = 0.02
    with caplog.at_level(logging.WARNING):
        with Served(make_site(engine)) as served:
            served.server._grace_s = 20.0
            connection = served.connect()
            connection.sendall(http_bytes("/v1/completions", {"prompt": "x", "stream": True, "max_tokens": 9}))
            wait_until(lambda: engine.asked)
        assert read_all(connection).endswith(b"0\r\n\r\n")
        connection.close()
    assert_quiet(caplog)


def test_it_touches_no_signals() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    server = Served(make_site()).server
    assert isinstance(server, HttpServer)

    with server.capture_signals():
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
