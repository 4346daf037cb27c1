"""Load a server with many requests at a time, and compare with llama.cpp's server on this machine.

    python -m svdengine.tools.bench_server --concurrency 8 32 --llama-server ~/llama.cpp/build/bin/llama-server

The servers take turns, each in its own process, with the same weights and threads, and with room for one context a
client. So many clients at a time each stream chat answers, one after another. llama-server runs as many at a time as
it has slots, here one a client. Without it the server of llama-cpp-python is taken, which runs one request at a time;
the others wait.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from svdengine.errors import SvdEngineError
from svdengine.tools.http_client import Address, request
from svdengine.tools.peer_engines import IK, LLAMA_CPP, SVDENGINE
from svdengine.tools.peer_models import Shelf, bench_folder, prepare
from svdengine.tools.peer_notes import cpu_name
from svdengine.tools.server_process import (
    free_port,
    llama_cpp_command,
    llama_server_command,
    running,
    svdengine_command,
)

_CONTEXT = 1024  # tokens of one request

Server = tuple[str, Callable[[int, int], list[str]]]  # its name, and its command for a port and a number of clients
_TOPICS = ("the sea", "a lighthouse", "trains", "bread", "the moon", "a town", "winter", "clocks", "a river", "bees")


@dataclass
class Load:
    """What the clients measured. Seconds."""

    tokens: int = 0
    first: list[float] = field(default_factory=list)  # from the request to the first piece of text, one a request
    gaps: list[float] = field(default_factory=list)  # between pieces of text, which are tokens
    seconds: float = 0.0  # of the whole


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    engine: str
    concurrency: int
    requests: int
    tokens_per_second: float
    first_p50: float  # milliseconds, as all below
    first_p99: float
    gap_p50: float
    gap_p99: float
    gap_longest: float


async def run_load(address: Address, concurrency: int, requests: int, tokens: int) -> Load:
    """Have `concurrency` clients stream `requests` answers of at most `tokens` tokens."""
    load = Load()
    numbers = iter(range(requests))
    started = time.perf_counter()

    async def client() -> None:
        for number in numbers:
            await _stream(address, number, tokens, load)

    await asyncio.gather(*(client() for _ in range(concurrency)))
    load.seconds = time.perf_counter() - started
    return load


async def _stream(address: Address, number: int, tokens: int, load: Load) -> None:
    topic = _TOPICS[number % len(_TOPICS)]
    text = f"Write a very long story about {topic}, in chapter {number} of a book."
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": tokens, "temperature": 0, "stream": True}
    before = began = time.perf_counter()
    first = True
    async with request(address, "/v1/chat/completions", body) as response:
        if response.status != 200:
            raise SvdEngineError(f"the server answered {response.status}: {(await response.body())[:300]!r}")
        async for event in response.events():
            if not any(choice["delta"].get("content") for choice in event.get("choices", ())):
                continue
            now = time.perf_counter()
            if first:
                load.first.append(now - began)
            else:
                load.gaps.append(now - before)
            before, first = now, False
            load.tokens += 1


def row_of(engine: str, concurrency: int, load: Load) -> Row:
    """Percentiles of a load. Raises SvdEngineError when no text came."""
    if not load.first or not load.gaps:
        raise SvdEngineError(f"{engine} gave no text to measure")
    first = 1000 * np.percentile(load.first, [50, 99])
    gaps = 1000 * np.percentile(load.gaps, [50, 99, 100])
    speed = load.tokens / load.seconds
    return Row(engine, concurrency, len(load.first), speed, *map(float, first), *map(float, gaps))


def markdown(rows: Sequence[Row], notes: Sequence[str]) -> str:
    """The table, and what its figures depend on."""
    lines = [
        "| server | clients | requests | tokens/s | first token p50, ms | p99 | next token p50, ms | p99 | longest |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        figures = f"{r.first_p50:.0f} | {r.first_p99:.0f} | {r.gap_p50:.1f} | {r.gap_p99:.1f} | {r.gap_longest:.1f}"
        lines.append(f"| {r.engine} | {r.concurrency} | {r.requests} | {r.tokens_per_second:.1f} | {figures} |")
    return "\n".join([*lines, "", *notes])


def measure(server: Server, clients: int, rounds: int, tokens: int) -> Row:
    """Start a server, warm it up, and have each client ask for `rounds` answers. Raises SvdEngineError."""
    port = free_port()
    name, command = server
    with running(command(port, clients), port, (0, -signal.SIGTERM)) as address:
        asyncio.run(run_load(address, 1, 1, 8))
        return row_of(name, clients, asyncio.run(run_load(address, clients, rounds * clients, tokens)))


def our_server(model: Path, threads: int, options: Sequence[str] = ()) -> Server:
    """`svdengine serve`, whose KV cache has room for a context of each client."""
    from svdengine.files.model_file import read_model_file
    from svdengine.scheduling.block_pool import kv_pool_bytes_per_token

    with read_model_file(model) as file:
        size = _CONTEXT * kv_pool_bytes_per_token(file.config, "f16")

    def command(port: int, clients: int) -> list[str]:
        given = {"--threads": threads, "--context": _CONTEXT, "--max-requests": clients, "--kv-memory": clients * size}
        return svdengine_command(model, port, *(str(part) for option in given.items() for part in option), *options)

    return SVDENGINE, command


def peer_servers(gguf: Path, threads: int, llama_server: Path | None, ik_llama_server: Path | None) -> list[Server]:
    """Builds of llama-server, or without one of llama.cpp the server of llama-cpp-python, where it is installed."""

    def slots(program: Path) -> Callable[[int, int], list[str]]:
        return lambda port, clients: llama_server_command(program, gguf, port, threads, clients, _CONTEXT)

    builds = [(LLAMA_CPP, llama_server), (IK, ik_llama_server)]
    servers = [(name, slots(program)) for name, program in builds if program is not None]
    if llama_server is None and all(find_spec(name) is not None for name in ("llama_cpp", "fastapi")):
        servers.append((LLAMA_CPP, lambda port, clients: llama_cpp_command(gguf, port, threads, _CONTEXT)))
    return servers


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="svdengine.tools.bench_server", description="Load servers.")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[8, 32], help="clients (default: 8 32)")
    parser.add_argument("--rounds", type=int, default=3, help="requests of each client (default: 3)")
    parser.add_argument("--tokens", type=int, default=128, help="of each answer, at most (default: 128)")
    parser.add_argument("--threads", type=int, help="of both (default: one a core)")
    parser.add_argument("--model", type=Path, help="a .svdp file to measure alone; by default SmolLM2 of all servers")
    parser.add_argument("--llama-server", type=Path, metavar="PATH", help="a build of llama.cpp's server")
    parser.add_argument("--ik-llama-server", type=Path, metavar="PATH", help="a build of ik_llama.cpp's server")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="further options of svdengine serve")
    parser.add_argument("--json", action="store_true", help="print a list of rows instead of the table")
    options = parser.parse_args(arguments)
    if min(*options.concurrency, options.rounds, options.tokens) < 1:
        parser.error("--concurrency, --rounds and --tokens must be at least 1")
    try:
        from svdengine.kernels.cores import default_threads

        options.threads = options.threads or default_threads()
        servers, rows = _servers(options), []
        for clients in options.concurrency:
            for server in servers:
                _report(f"{server[0]}, {clients} clients")
                rows.append(measure(server, clients, options.rounds, options.tokens))
    except (SvdEngineError, OSError) as error:
        sys.exit(f"error: {error}")
    notes = [f"{cpu_name()}, {options.threads} threads; answers of at most {options.tokens} tokens."]
    print(json.dumps([vars(row) for row in rows], indent=1) if options.json else markdown(rows, notes))


def _servers(options: Any) -> list[Server]:
    if options.model is not None:
        return [our_server(options.model, options.threads, options.serve)]
    pair = prepare("smollm2", 8, Shelf(bench_folder(), _report))
    peers = peer_servers(pair.gguf, options.threads, options.llama_server, options.ik_llama_server)
    if not peers:
        raise SvdEngineError(
            'there is no server to compare with; give --llama-server, or run: pip install "llama-cpp-python[server]"'
        )
    return [our_server(pair.svdp, options.threads, options.serve), *peers]


def _report(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
