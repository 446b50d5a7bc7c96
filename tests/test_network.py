"""The guard that keeps tests off the network works."""

from __future__ import annotations

import socket

import pytest


def test_a_connection_that_leaves_the_machine_is_refused() -> None:
    with socket.socket() as outside, pytest.raises(OSError, match="tests have no network"):
        outside.connect(("192.0.2.1", 80))  # a documentation address (RFC 5737), never assigned


def test_a_name_that_leaves_the_machine_is_not_looked_up() -> None:
    with pytest.raises(socket.gaierror, match="tests have no network"):
        socket.create_connection(("example.org", 443))


def test_loopback_stays_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()
        server.settimeout(5)
        peer, _ = server.accept()
        with peer:
            assert peer.recv(1) == b""
