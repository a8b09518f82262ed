"The proxy that the other tests break the network with does to a connection what it says."

import socket
import threading
import time
from contextlib import suppress

import pytest
from servers import wait_for

from faults.proxy import Proxy


@pytest.fixture
def echo():
    "A server that says again what it hears, behind a proxy."
    server = socket.create_server(("127.0.0.1", 0))

    def serve(connection):
        with connection, suppress(ConnectionError):
            while data := connection.recv(65536):
                connection.sendall(data)

    def accept():
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    proxy = Proxy(f"127.0.0.1:{server.getsockname()[1]}")
    yield proxy
    proxy.close()
    server.shutdown(socket.SHUT_RDWR)
    server.close()


def call(proxy, timeout_s=10.0):
    return socket.create_connection(("127.0.0.1", proxy.port), timeout_s)


def say(connection, data):
    connection.sendall(data)
    heard = b""
    while len(heard) < len(data):
        heard += connection.recv(65536) or pytest.fail(f"closed after {len(heard)} bytes")
    return heard


def test_what_comes_is_passed_on_whole_and_in_order(echo):
    data = bytes(range(256)) * 4096
    with call(echo) as c:
        for _ in range(3):
            assert say(c, data) == data


def test_an_end_is_passed_on(echo):
    with call(echo) as c:
        assert say(c, b"x") == b"x"
        c.shutdown(socket.SHUT_WR)
        assert c.recv(1) == b""


def test_a_cut_resets_connections_and_refuses_new_ones_until_it_is_healed(echo):
    with call(echo) as c:
        say(c, b"x")
        echo.cut()
        with pytest.raises(ConnectionResetError):
            c.recv(1)
    with pytest.raises(ConnectionError), call(echo) as c:
        say(c, b"x")
        say(c, b"x")
    echo.heal()
    with call(echo) as c:
        assert say(c, b"y") == b"y"


def test_a_hole_answers_nothing_and_what_it_swallowed_is_never_passed_on(echo):
    with call(echo) as quiet, call(echo) as c:
        say(quiet, b"x")
        say(c, b"x")
        echo.hole()
        c.sendall(b"lost")
        c.settimeout(0.2)
        with pytest.raises(TimeoutError):
            c.recv(1)
        wait_for(lambda: any(pair.holed for pair in echo._pairs))
        echo.heal()
        c.settimeout(10)
        with pytest.raises(ConnectionResetError):
            c.recv(1)
        assert say(quiet, b"still here") == b"still here"


def test_a_slow_link_delays_and_throttles(echo):
    with call(echo) as c:
        say(c, b"x")
        echo.latency_s = 0.1
        since = time.monotonic()
        say(c, b"x")
        assert time.monotonic() - since >= 0.2
        echo.latency_s, echo.bytes_per_s = 0.0, 100_000.0
        since = time.monotonic()
        say(c, bytes(30_000))
        assert time.monotonic() - since >= 0.25


def test_a_target_that_is_not_there_resets_the_caller(echo):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        echo.target = f"127.0.0.1:{s.getsockname()[1]}"
    with pytest.raises(ConnectionError), call(echo) as c:
        say(c, b"x")
        say(c, b"x")
