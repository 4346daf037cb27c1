"""Servers to measure or to test, each in its own process on a free port of this machine."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from svdengine.errors import SvdEngineError
from svdengine.tools.http_client import Address, request

_START_SECONDS = 180.0  # the first start compiles kernels
_STOP_SECONDS = 60.0


def svdengine_command(model: Path, port: int, *options: str) -> list[str]:
    """svdengine's server."""
    return [sys.executable, "-m", "svdengine", "serve", str(model), "--port", str(port), *options]


def llama_cpp_command(model: Path, port: int, threads: int, context: int) -> list[str]:
    """llama.cpp behind the server of llama-cpp-python, which runs one request at a time."""
    options = {"model": model, "port": port, "n_threads": threads, "n_threads_batch": threads, "n_ctx": context}
    options |= {"interrupt_requests": "false", "verbose": "false"}
    return [sys.executable, "-m", "llama_cpp.server", *(f"--{name}={value}" for name, value in options.items())]


def llama_server_command(program: Path, model: Path, port: int, threads: int, slots: int, context: int) -> list[str]:
    """A build of llama-server with `slots` requests at a time, each with a context of its own."""
    options = {"-m": model, "--port": port, "-t": threads, "-tb": threads, "-np": slots, "-c": slots * context}
    return [str(program), *(str(part) for option in options.items() for part in option)]


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
    return port


@contextmanager
def running(command: Sequence[str], port: int, codes: Sequence[int] = (0,)) -> Iterator[Address]:
    """Start a server, wait until it answers, and end it by SIGTERM.

    Raises SvdEngineError when it does not start, or ends with a code that is not one of `codes`.
    """
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            address = Address(port)
            _wait_until_up(process, address, log)
            yield address
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
        if process.returncode not in codes:
            raise SvdEngineError(f"the server ended with code {process.returncode}: {_tail(log)}")


def _wait_until_up(process: subprocess.Popen[bytes], address: Address, log: object) -> None:
    last = time.monotonic() + _START_SECONDS
    while time.monotonic() < last:
        if process.poll() is not None:
            raise SvdEngineError(f"the server ended at its start: {_tail(log)}")
        try:
            if asyncio.run(_status(address)) == 200:
                return
        except OSError:
            pass
        time.sleep(0.2)
    raise SvdEngineError(f"the server did not answer within {_START_SECONDS:g} seconds: {_tail(log)}")


async def _status(address: Address) -> int:
    async with request(address, "/v1/models") as response:
        return response.status


def _tail(log: object) -> str:
    log.seek(0)  # type: ignore[attr-defined]
    lines = log.read().decode(errors="replace").strip().splitlines()  # type: ignore[attr-defined]
    return " / ".join(lines[-3:])[-500:] or "it said nothing"
