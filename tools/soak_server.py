"""Hold a server under load, with clients that leave, read slowly or send nonsense, and look for what it loses or keeps.

    python -m svdengine.tools.soak_server model.svdp --minutes 60 --clients 32

All on this machine's loopback interface, in a bounded time. It fails when a well-formed request gets no whole answer,
nonsense gets anything but an error that blames the client, the server keeps a request or a KV block when all clients
have gone, its memory grows, or it does not end when it is told to.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svdengine.errors import SvdEngineError
from svdengine.tools.http_client import Address, Response, connection, encode, head, request
from svdengine.tools.server_process import free_port, running, svdengine_command

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"

_BODY_LIMIT = 1 << 20  # that the server is given
_PATIENCE = 120.0  # seconds for any one answer
_SAMPLE_SECONDS = 1.0
_IDLE_SECONDS = 30.0  # for the server to let go of what clients left
_GROWTH = 0.05  # of the memory in the third quarter, that the last one may have more; and bytes besides
_GROWTH_BYTES = 16 << 20
_WORDS = ("sun", "rain", "stone", "river", "cloud", "engine", "paper", "glass", "winter", "green", "quick", "seven")


@dataclass
class Report:
    """What happened so far."""

    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)  # resident bytes, one a sample

    def problem(self, text: str) -> None:
        """Note a failure; only the first ones are kept in words."""
        self.counts["problems"] += 1
        if len(self.problems) < 20:
            self.problems.append(text)


Client = Callable[[Address, random.Random, Report], Awaitable[None]]


async def whole_answer(address: Address, chance: random.Random, report: Report) -> None:
    """A request whose answer is read at once."""
    path, body = _well_formed(chance)
    async with request(address, path, body) as response:
        found = json.loads(await response.body())
        if response.status == 429:
            await _come_later(response, report)
        elif response.status != 200 or any(c["finish_reason"] is None for c in found["choices"]):
            report.problem(f"status {response.status} for {body}: {found}")
        else:
            report.counts["answered"] += 1


async def stream(address: Address, chance: random.Random, report: Report) -> None:
    """A request whose answer is read as it comes, at times slowly."""
    path, body = _well_formed(chance)
    body["stream"] = True
    slow = chance.random() < 0.3
    async with request(address, path, body) as response:
        if response.status == 429:
            await _come_later(response, report)
            return
        ended = set()
        async for event in response.events():
            if "error" in event:
                report.problem(f"an error in a stream: {event}")
            ended |= {c["index"] for c in event.get("choices", ()) if c["finish_reason"] is not None}
            if slow:
                await asyncio.sleep(chance.random() * 0.1)
        if ended != set(range(body.get("n", 1))):
            report.problem(f"choices {sorted(ended)} of {body} ended")
        report.counts["read slowly" if slow else "streamed"] += 1


async def leave(address: Address, chance: random.Random, report: Report) -> None:
    """A client that goes before its answer is there."""
    path, body = _well_formed(chance)
    body |= {"stream": chance.random() < 0.7, "max_tokens": 200}
    async with connection(address) as (reader, writer):
        writer.write(head(path, encode(body)) + encode(body))
        await writer.drain()
        with suppress(TimeoutError, asyncio.IncompleteReadError):
            async with asyncio.timeout(2 * chance.random()):
                await reader.readexactly(chance.randint(1, 2000))
    report.counts["left early"] += 1


async def nonsense(address: Address, chance: random.Random, report: Report) -> None:
    """A request that is at fault, which the answer says."""
    path, body = _well_formed(chance)
    data = encode(body)
    broken: list[bytes] = [
        data[: chance.randint(0, len(data) - 1)],
        chance.randbytes(chance.randint(1, 3000)),
        b"[" * 50_000,
        encode({**body, "temperature": "hot"}),
        encode({**body, "no_such_field": 1}),
        encode({"messages": [{"role": "user", "content": "x " * 100_000}]}),
        b'{"x": "' + b"x" * (3 * _BODY_LIMIT) + b'"}',
    ]
    async with request(address, path, chance.choice(broken) or b" ") as response:
        await response.body()
        if not 400 <= response.status < 500:
            report.problem(f"status {response.status} for nonsense")
    report.counts["nonsense refused"] += 1


async def half_a_request(address: Address, chance: random.Random, report: Report) -> None:
    """A client that stops in the middle of what it sends, or sends what is no HTTP."""
    async with connection(address) as (_, writer):
        if chance.random() < 0.5:
            writer.write(head(CHAT, b"x", chance.randint(2, 1 << 30)) + b"{" * chance.randint(0, 1000))
        else:
            writer.write(chance.randbytes(chance.randint(1, 5000)))
        await writer.drain()
        await asyncio.sleep(chance.random() * 0.5)
    report.counts["half requests"] += 1


async def _come_later(response: Response, report: Report) -> None:
    report.counts["told to come later"] += 1
    await asyncio.sleep(float(response.headers["retry-after"]))


_CLIENTS: dict[Client, float] = {whole_answer: 4, stream: 4, leave: 3, nonsense: 2, half_a_request: 1}


def _well_formed(chance: random.Random) -> tuple[str, dict[str, Any]]:
    text = " ".join(chance.choices(_WORDS, k=chance.randint(1, 60)))
    body: dict[str, Any] = {"max_tokens": chance.randint(1, 60), "temperature": chance.choice([0, 0.8])}
    if chance.random() < 0.2:
        body["n"] = 2
    if chance.random() < 0.2:
        body["stop"] = [chance.choice(_WORDS), "\n\n"]
    if chance.random() < 0.3:
        return PLAIN, {**body, "prompt": text}
    system = [{"role": "system", "content": "Answer briefly."}] if chance.random() < 0.5 else []
    return CHAT, {**body, "messages": [*system, {"role": "user", "content": text}]}


async def soak(address: Address, seconds: float, clients: int, seed: int, report: Report) -> None:
    """Let the clients work for so long, then see what the server has kept."""
    last = time.monotonic() + seconds
    watch = asyncio.create_task(_watch_memory(address, report))
    await asyncio.gather(*(_work(address, random.Random(seed + i), last, report) for i in range(clients)))
    watch.cancel()
    await _check_idle(address, report)
    _check_memory(report)


async def _work(address: Address, chance: random.Random, last: float, report: Report) -> None:
    kinds, weights = list(_CLIENTS), list(_CLIENTS.values())
    while time.monotonic() < last:
        (client,) = chance.choices(kinds, weights)
        try:
            async with asyncio.timeout(_PATIENCE):
                await client(address, chance, report)
        except ConnectionError:
            # A server may cut a connection on which it is sent more than it wants; anyone else is owed an answer.
            if client in (whole_answer, stream):
                report.problem("a connection was cut")
            report.counts["connections cut"] += 1
        except Exception as error:
            report.problem(f"{client.__name__}: {error!r}")


async def _metrics(address: Address) -> dict[str, float]:
    async with request(address, "/metrics") as response:
        lines = (await response.body()).decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}


async def _watch_memory(address: Address, report: Report) -> None:
    while True:
        found = (await _metrics(address)).get("process_resident_memory_bytes")
        if found is not None:
            report.memory.append(int(found))
        await asyncio.sleep(_SAMPLE_SECONDS)


async def _check_idle(address: Address, report: Report) -> None:
    last = time.monotonic() + _IDLE_SECONDS
    while True:
        found = await _metrics(address)
        kept = {n: found[n] for n in ("svdengine_requests", 'svdengine_kv_blocks{state="used"}') if found[n]}
        if not kept:
            return
        if time.monotonic() > last:
            report.problem(f"all clients have gone, and the server still has {kept}")
            return
        await asyncio.sleep(0.2)


def _check_memory(report: Report) -> None:
    quarter = len(report.memory) // 4
    if quarter < 3:
        return
    before = statistics.median(report.memory[-2 * quarter : -quarter])  # buffers and caches are filled by then
    after = statistics.median(report.memory[-quarter:])
    if after > before * (1 + _GROWTH) + _GROWTH_BYTES:
        report.problem(f"memory grew from {before / 2**20:.0f} to {after / 2**20:.0f} MiB")


def summary(report: Report) -> str:
    """What happened, in lines."""
    lines = [f"{name:20} {count}" for name, count in sorted(report.counts.items())]
    if report.memory:
        memory = [value / 2**20 for value in report.memory]
        lines.append(f"{'memory':20} {memory[0]:.0f} MiB at first, {max(memory):.0f} at most, {memory[-1]:.0f} at last")
    return "\n".join([*lines, *(f"problem: {text}" for text in report.problems)])


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="svdengine.tools.soak_server", description="Soak the server.")
    parser.add_argument("model", type=Path, help="a .svdp file")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default: 10)")
    parser.add_argument("--clients", type=int, default=32, help="at a time (default: 32)")
    parser.add_argument("--capacity", type=int, default=24, help="completions that the server takes (default: 24)")
    parser.add_argument("--seed", type=int, default=0, help="of what the clients do")
    options = parser.parse_args(arguments)
    if options.clients < 1 or options.minutes <= 0 or options.capacity < 2:
        parser.error("--clients and --minutes must be positive, --capacity at least 2")
    report = Report()
    port = free_port()
    limits = ("--max-requests", str(options.capacity), "--max-body", str(_BODY_LIMIT >> 20), "--context", "1024")
    try:
        with running(svdengine_command(options.model, port, *limits), port) as address:
            asyncio.run(soak(address, 60 * options.minutes, options.clients, options.seed, report))
    except (SvdEngineError, OSError) as error:
        report.problem(str(error))
    print(summary(report))
    sys.exit(1 if report.problems else 0)


if __name__ == "__main__":
    main()
