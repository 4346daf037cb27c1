"""Connections that send nothing, or slowly, do not keep others out."""

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import LiveServer, live_server
from patience import PATIENCE, eventually
from test_server import HELLO, ask

HEAD = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("connections")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[LiveServer]:
    with live_server(folder, max_connections=12, address_connections=6, head_seconds=2.0, body_seconds=2.0) as server:
        yield server
        eventually(lambda: not server.http._connections.count)


def connect(server: LiveServer, address: str = "127.0.0.1") -> socket.socket:
    found = socket.create_connection(server.address, source_address=(address, 0))
    found.settimeout(PATIENCE)
    return found


def ended(connection: socket.socket) -> bool:
    """Whether the server cuts it, which is waited for."""
    try:
        while connection.recv(1 << 16):
            pass
        return True
    except ConnectionError:
        return True


@pytest.mark.parametrize("sent", [b"", b"GET /health HT", HEAD])
def test_a_head_that_does_not_come_is_cut(server: LiveServer, sent: bytes) -> None:
    with connect(server) as slow:
        slow.sendall(sent)
        assert ended(slow)


def test_a_head_in_drops_is_cut(server: LiveServer) -> None:
    with connect(server) as slow:
        begun = time.monotonic()
        with pytest.raises(ConnectionError):
            for byte in (HEAD + b"x: " + b"y" * 1000)[:200]:
                slow.sendall(bytes([byte]))
                time.sleep(0.05)
        assert time.monotonic() - begun > 1


def test_the_second_request_has_a_deadline_too(server: LiveServer) -> None:
    with connect(server) as slow:
        slow.sendall(HEAD + b"\r\n")
        assert slow.recv(1 << 16).startswith(b"HTTP/1.1 200")
        slow.sendall(b"GET /hea")
        assert ended(slow)


def test_a_body_after_the_answer_is_cut(server: LiveServer) -> None:
    with connect(server) as slow:
        slow.sendall(b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n")
        assert slow.recv(1 << 16).startswith(b"HTTP/1.1 404")
        with pytest.raises(ConnectionError):
            for _ in range(200):
                slow.sendall(b"x")
                time.sleep(0.05)


def test_idle_connections_give_way(server: LiveServer) -> None:
    idle = [connect(server) for _ in range(40)]
    try:
        assert server.http._connections.count <= 6
        assert ask(server, "/health")[0] == 200
        assert ended(idle[0])
        others = [connect(server, f"127.0.0.{2 + i % 5}") for i in range(40)]
        assert ask(server, "/health")[0] == 200 and server.http._connections.count <= 12
        for each in others:
            each.close()
    finally:
        for each in idle:
            each.close()


def test_busy_connections_are_kept_and_more_are_told(server: LiveServer) -> None:
    body = json.dumps({"messages": HELLO, "max_tokens": 3, "ignore_eos": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    server.gate.hold()
    busy = [connect(server) for _ in range(6)]
    try:
        for each in busy:
            each.sendall(head.encode() + body)
        eventually(lambda: server.service.loop.request_count == 6)
        with connect(server) as more:
            answer = b"".join(iter(lambda: more.recv(1 << 16), b""))
        head_part, _, rest = answer.partition(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 503") and b"retry-after" in head_part
        assert json.loads(rest)["error"]["type"] == "server_error"
        assert f"content-length: {len(rest)}".encode() in head_part
        with connect(server, "127.0.0.9") as other:
            other.sendall(HEAD + b"\r\n")
            assert other.recv(1 << 16).startswith(b"HTTP/1.1 200")
        server.gate.let_go()
        assert all(each.recv(1 << 16).startswith(b"HTTP/1.1 200") for each in busy)
    finally:
        server.gate.let_go()
        for each in busy:
            each.close()
