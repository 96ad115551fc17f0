"""What `slicevit serve` does with connections that send no whole request."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.client import HTTPResponse
from types import SimpleNamespace

import pytest
from serving_fakes import TABLE, FakeEngine

pytestmark = pytest.mark.extra
for package in ("fastapi", "uvicorn", "prometheus_client", "python_multipart", "fastapi_offline", "httptools"):
    pytest.importorskip(package, reason=f'needs {package}: pip install "slicevit[serve]"')

from slicevit.serving import connections  # noqa: E402
from slicevit.serving.app import create_app  # noqa: E402
from slicevit.serving.server import configuration, listener  # noqa: E402
from slicevit.serving.settings import Settings  # noqa: E402

GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Of a server in a thread, which waits a second for a head."""
    import uvicorn

    monkeypatch.setattr(connections, "HEAD_SECONDS", 1.0)
    server = uvicorn.Server(configuration(create_app(FakeEngine(), TABLE, Settings(slo_ms=20_000.0))))
    bound = listener("127.0.0.1", 0)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([bound])))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield bound.getsockname()[1]
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def answer(connection: socket.socket) -> tuple[int, str]:
    """Status, and detail of a refusal, of what comes until the connection is closed; 0 where nothing comes."""
    received = b""
    try:
        while piece := connection.recv(65_536):
            received += piece
    except ConnectionResetError:
        pass
    if not received:
        return 0, ""
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body).get("detail", "")


def first_status(connection: socket.socket) -> int:
    """Of an answer after which the connection stays open, read to its end."""
    response = HTTPResponse(connection)
    response.begin()
    response.read()
    return response.status


@pytest.mark.parametrize("kind", ["one header", "many headers", "the address"])
def test_a_head_that_is_too_large(kind: str, port: int) -> None:
    with connected(port) as connection:
        connection.sendall(b"GET /" if kind == "the address" else GET)
        sent = 0
        try:
            while sent < 2**25:
                sent += connection.send(b"a" * 50_000 if kind != "many headers" else b"X-A: b\r\n" * 5_000)
        except OSError:
            pass
        assert sent < 2**25  # 32 MiB: it did not wait for that
    with connected(port) as connection:
        piece = {"one header": b"X-A: " + b"a" * 70_000, "many headers": b"X-A: b\r\n" * 9_000}
        connection.sendall(GET + piece[kind] if kind != "the address" else b"GET /" + b"a" * 70_000)
        assert answer(connection) == (431, "the request line and headers are larger than 65536 bytes")


def test_a_large_head_within_the_limit(port: int) -> None:
    with connected(port) as connection:
        connection.sendall(GET + b"X-A: " + b"a" * 60_000 + b"\r\nConnection: close\r\n\r\n")
        assert answer(connection)[0] == 200


def test_bodies_are_not_heads(port: int) -> None:
    """Two requests with bodies of twice a head's limit on one connection, the second head in two pieces."""
    body = b"a" * 131_072
    post = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n" % len(body)
    with connected(port) as connection:
        connection.sendall(post + b"\r\n" + body)
        assert first_status(connection) == 415
        connection.sendall(post[:20])
        time.sleep(0.1)
        connection.sendall(post[20:] + b"Connection: close\r\n\r\n" + body)
        assert answer(connection)[0] == 415


@pytest.mark.parametrize(("sent", "status"), [(b"", 0), (b"GET /he", 408), (GET, 408), (GET + b"X-A: b", 408)])
def test_a_head_that_does_not_come(sent: bytes, status: int, port: int) -> None:
    with connected(port) as connection:
        connection.sendall(sent)
        began = time.monotonic()
        assert answer(connection)[0] == status
        assert 0.5 < time.monotonic() - began < 10


def test_the_second_head_of_a_connection_has_as_long(port: int) -> None:
    with connected(port) as connection:
        connection.sendall(GET + b"\r\n")
        assert first_status(connection) == 200
        time.sleep(1.5)  # idle, as long as a proxy likes
        connection.sendall(GET)
        assert answer(connection)[0] == 408


def test_connections_beyond_the_limit_are_refused_and_others_are_not(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "most_connections", lambda: 3)
    kept = [connected(port) for _ in range(3)]
    for each in kept:
        each.sendall(GET + b"\r\n")
        assert first_status(each) == 200
    with connected(port) as one_more:
        assert answer(one_more) == (503, "too many connections are open: try again")
    kept[0].sendall(GET + b"Connection: close\r\n\r\n")
    assert answer(kept[0])[0] == 200
    with connected(port) as again:
        again.sendall(GET + b"Connection: close\r\n\r\n")
        assert answer(again)[0] == 200
    for each in kept:
        each.close()


def test_the_limit_is_that_of_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = SimpleNamespace(getrlimit=lambda which: (1024, 4096), RLIMIT_NOFILE=7)
    monkeypatch.setattr(connections, "resource", limits)
    assert connections.most_connections() == 924
