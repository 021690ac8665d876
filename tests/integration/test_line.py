"""The test line itself: what goes in comes out, at its rate, and not while it is cut."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.integration.line import Line

NUM_BYTES = 200_000


@pytest.fixture
def echo() -> Iterator[int]:
    with socket.create_server(("localhost", 0)) as server:

        def serve() -> None:
            client, _ = server.accept()
            with client:
                while data := client.recv(65536):
                    client.sendall(data)

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        thread.join(timeout=10)


def exchange(line: Line) -> bytes:
    found = b""
    with socket.create_connection(("localhost", line.port), timeout=30) as client:
        client.sendall(bytes(NUM_BYTES))
        while len(found) < NUM_BYTES:
            found += client.recv(65536)
    return found


def test_what_goes_in_comes_out_at_the_lines_rate(echo: int):
    line = Line(echo, bits_per_s=8 * NUM_BYTES)  # one second each way
    line.open()
    began = time.monotonic()
    assert exchange(line) == bytes(NUM_BYTES)
    assert time.monotonic() - began > 0.4  # a burst of half a second is free
    assert (line.num_bytes, line.num_bytes_back) == (2 * NUM_BYTES, NUM_BYTES)
    line.close()


def test_its_rate_can_change(echo: int):
    line = Line(echo)
    line.open()
    line.limit(8 * NUM_BYTES)
    began = time.monotonic()
    assert exchange(line) == bytes(NUM_BYTES)
    assert time.monotonic() - began > 0.4
    line.close()


def test_nothing_passes_while_it_is_cut(echo: int):
    line = Line(echo)
    line.open()
    line.cut()
    mend = threading.Timer(0.5, line.mend)
    began = time.monotonic()
    mend.start()
    assert exchange(line) == bytes(NUM_BYTES)
    assert time.monotonic() - began >= 0.4
    line.close()
