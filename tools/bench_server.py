"""Load a server with many requests at a time, and compare with llama.cpp's server on this machine.

    python -m svdengine.tools.bench_server --concurrency 8 32

The servers take turns, each in its own process, with the same weights and threads. So many clients at a time each
stream chat answers, one after another. The server of llama-cpp-python runs one request at a time; the others wait.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from svdengine.errors import SvdEngineError
from svdengine.tools.bench_peers import cpu_name
from svdengine.tools.http_client import Address, request
from svdengine.tools.server_process import free_port, llama_cpp_command, running, svdengine_command

_CONTEXT = 1024  # tokens of one request
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
    first, gaps = (1000 * np.percentile(values, [50, 99]) for values in (load.first, load.gaps))
    speed = load.tokens / load.seconds
    return Row(engine, concurrency, len(load.first), speed, *map(float, first), *map(float, gaps))


def markdown(rows: Sequence[Row], notes: Sequence[str]) -> str:
    """The table, and what its figures depend on."""
    lines = [
        "| server | clients | requests | tokens/s | first token p50, ms | p99 | next token p50, ms | p99 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        figures = f"{r.first_p50:.0f} | {r.first_p99:.0f} | {r.gap_p50:.1f} | {r.gap_p99:.1f}"
        lines.append(f"| {r.engine} | {r.concurrency} | {r.requests} | {r.tokens_per_second:.1f} | {figures} |")
    return "\n".join([*lines, "", *notes])


def measure(command: Sequence[str], port: int, engine: str, concurrency: int, options: Any) -> Row:
    """Start a server, warm it up, and load it."""
    with running(command, port, (0, -signal.SIGTERM)) as address:
        asyncio.run(run_load(address, 1, 1, 8))
        requests = options.rounds * concurrency
        return row_of(engine, concurrency, asyncio.run(run_load(address, concurrency, requests, options.tokens)))


def compare(svdp: Path, gguf: Path | None, options: Any) -> list[Row]:
    """A row for each server and number of clients."""
    rows = []
    for concurrency in options.concurrency:
        port = free_port()
        threads = ("--threads", str(options.threads), "--context", str(_CONTEXT), "--max-requests", str(concurrency))
        _report(f"svdengine, {concurrency} clients")
        command = svdengine_command(svdp, port, *threads, *options.serve)
        rows.append(measure(command, port, "svdengine", concurrency, options))
        if gguf is not None:
            port = free_port()
            _report(f"llama.cpp, {concurrency} clients")
            command = llama_cpp_command(gguf, port, options.threads, _CONTEXT)
            rows.append(measure(command, port, "llama.cpp", concurrency, options))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="svdengine.tools.bench_server", description="Load servers.")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[8, 32], help="clients (default: 8 32)")
    parser.add_argument("--rounds", type=int, default=3, help="requests of each client (default: 3)")
    parser.add_argument("--tokens", type=int, default=128, help="of each answer, at most (default: 128)")
    parser.add_argument("--threads", type=int, help="of both (default: one a core)")
    parser.add_argument("--model", type=Path, help="a .svdp file to measure alone; by default SmolLM2 of both engines")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="further options of svdengine serve")
    parser.add_argument("--json", action="store_true", help="print a list of rows instead of the table")
    options = parser.parse_args(arguments)
    if min(*options.concurrency, options.rounds, options.tokens) < 1:
        parser.error("--concurrency, --rounds and --tokens must be at least 1")
    try:
        from svdengine.kernels.cores import default_threads

        options.threads = options.threads or default_threads()
        rows = compare(*_models(options.model), options)
    except (SvdEngineError, OSError) as error:
        sys.exit(f"error: {error}")
    notes = [f"{cpu_name()}, {options.threads} threads; answers of at most {options.tokens} tokens."]
    print(json.dumps([vars(row) for row in rows], indent=1) if options.json else markdown(rows, notes))


def _models(svdp: Path | None) -> tuple[Path, Path | None]:
    if svdp is not None:
        return svdp, None
    from importlib.util import find_spec

    from svdengine.tools.peer_models import prepare

    if any(find_spec(name) is None for name in ("llama_cpp", "fastapi")):
        raise SvdEngineError('llama.cpp\'s server is missing; run: pip install "llama-cpp-python[server]"')
    (pair,) = prepare("smollm2", _report)
    return pair.svdp, pair.gguf


def _report(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
