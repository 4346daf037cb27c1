"""Run a service on a socket until a signal asks it to end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from svdengine.errors import SvdEngineError
from svdengine.server.app import create_app
from svdengine.server.connections import Connections, connection_class
from svdengine.server.service import Service
from svdengine.server.settings import Settings

_BACKLOG = 1024  # connections that the system holds until they are taken
_OTHER_FILES = 64  # that the process may need beside its connections
_IDLE_SECONDS = 30  # that a connection is kept without a request
_STUCK_SECONDS = 60  # that a client may leave sent data unread before its connection is cut
_FLUSH_SECONDS = 5  # for the last bytes of answers
_HANGUP: int | None = getattr(signal, "SIGHUP", None)  # Windows has none


def listen(settings: Settings) -> socket.socket:
    """A socket on the settings' host and port; port 0 takes a free one. Raises SvdEngineError when it cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        found = socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        raise SvdEngineError(f"cannot listen on {settings.host} port {settings.port}: {error.strerror}") from error
    found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # connections inherit both
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * _STUCK_SECONDS)
    return found


def url_of(listening: socket.socket) -> str:
    """Where a browser on this machine finds it."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{host}:{port}"


def _allowed_files(wanted: int) -> int:
    """How many files the process may have open: as many as wanted, where the system lets us raise that."""
    if sys.platform == "win32":
        return wanted
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return soft


class HttpServer:
    """Serves until `stop` or a signal: then it takes no more requests, lets those that run end, and returns."""

    def __init__(self, service: Service, on_signal: Callable[[], None] = lambda: None) -> None:
        """`on_signal` is called when a signal asked for the end."""
        self._service = service
        self._on_signal = on_signal
        self._connections = Connections(service.settings)
        config = uvicorn.Config(
            create_app(service),
            http=connection_class(self._connections),
            ws="none",
            lifespan="on",
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=_IDLE_SECONDS,
            timeout_graceful_shutdown=_FLUSH_SECONDS,
        )
        self._server = _Server(config, self._signalled)
        self._ending = False

    def run(self, listening: socket.socket) -> None:
        """Serve. In the main thread, SIGINT, SIGTERM and SIGHUP end it; a second one of the first two at once."""
        self._connections.limit(_allowed_files(self._service.settings.max_connections + _OTHER_FILES) - _OTHER_FILES)
        asyncio.run(self._run(listening))

    def stop(self) -> None:
        """End as a signal does; from any thread."""
        self._ending = True

    async def _run(self, listening: socket.socket) -> None:
        drain = asyncio.create_task(self._drain())
        try:
            await self._server.serve(sockets=[listening])
        finally:
            drain.cancel()

    async def _drain(self) -> None:
        """Wait for the end to be wanted, then for what runs. Meanwhile new requests are told that the server ends."""
        service = self._service
        while not self._ending:
            await asyncio.sleep(0.05)
        service.drain()
        last = time.monotonic() + service.settings.drain_seconds + _FLUSH_SECONDS
        while (service.loop.request_count or service.open_responses) and time.monotonic() < last:
            await asyncio.sleep(0.05)
        self._server.should_exit = True

    def _signalled(self, number: int) -> None:
        if self._ending and number != _HANGUP:  # a terminal that closes may say so twice
            self._server.should_exit = self._server.force_exit = True
        self._ending = True
        self._on_signal()


class _Server(uvicorn.Server):
    """Leaves to us when to exit after a signal."""

    def __init__(self, config: uvicorn.Config, on_signal: Callable[[int], None]) -> None:
        super().__init__(config)
        self._on_signal = on_signal

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals while the server runs, where that is possible."""

        def handle(number: int, frame: FrameType | None) -> None:
            hung_up.append(number == _HANGUP)
            self._on_signal(number)

        hung_up: list[bool] = []
        try:
            before = {number: signal.signal(number, handle) for number in _end_signals()}
        except ValueError:  # not in the main thread
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                # What is done after the end, such as writing the KV cache, is not to be cut by another hangup.
                signal.signal(number, signal.SIG_IGN if number == _HANGUP and any(hung_up) else handler)


def _end_signals() -> list[int]:
    """Signals that ask for the end. SIGHUP is left alone where it is ignored, as under nohup."""
    wanted = [int(signal.SIGINT), int(signal.SIGTERM)]
    return wanted if _HANGUP is None or signal.getsignal(_HANGUP) == signal.SIG_IGN else [*wanted, _HANGUP]
