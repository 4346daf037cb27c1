"""The parts of a comparison that are no test of one model: servers under load, starts, and busy neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from svdengine.tools import bench_server
from svdengine.tools.busy_cores import busy, usable_cores
from svdengine.tools.peer_compare import in_turn
from svdengine.tools.peer_engines import LLAMA_CPP, SVDENGINE, Engine, svdengine
from svdengine.tools.peer_models import Pair, Report
from svdengine.tools.peer_run import Figure, SpeedTest
from svdengine.tools.peer_start import Start, llama_completion_command, measure_start, svdengine_command
from svdengine.tools.peer_table import Row, Side

_ANSWERS = 2  # of each client
_SERVED = (  # field of a server's row, how it is called here, its unit
    ("tokens_per_second", "", "tokens/s"),
    ("first_p50", ", first token, median", "ms"),
    ("first_p99", ", first token, 99 %", "ms"),
    ("gap_p99", ", next token, 99 %", "ms"),
    ("gap_longest", ", next token, longest", "ms"),
)


def server_rows(pair: Pair, options: Any, report: Report) -> list[Row]:
    """Servers with so many clients at a time as `options.clients` says."""
    servers = [
        bench_server.our_server(pair.svdp, options.threads),
        *bench_server.peer_servers(pair.gguf, options.threads, options.llama_server, options.ik_llama_server),
    ]
    rows = []
    for clients in options.clients:
        runs: list[tuple[str, Callable[[], bench_server.Row]]] = [
            (server[0], partial(bench_server.measure, server, clients, _ANSWERS, pair.decode)) for server in servers
        ]
        report(f"server, {clients} clients")
        results = in_turn(runs, options.repetitions, report)
        for field, what, unit in _SERVED:
            sides = {name: Side(tuple(getattr(row, field) for row in found)) for name, found in results.found.items()}
            work = f"server, {pair.name}, {clients} client{'s' if clients > 1 else ''}{what}"
            rows.append(Row(work, sides, unit, failures=results.failures if not what else {}))
    return rows


def start_rows(pair: Pair, llama_completion: Path | None, threads: int, repetitions: int, report: Report) -> list[Row]:
    """From the command to the first output, with all files in the system's cache; and memory at most."""
    commands = [(SVDENGINE, svdengine_command(pair.svdp, threads))]
    if llama_completion is not None:
        commands.append((LLAMA_CPP, llama_completion_command(llama_completion, pair.gguf, threads)))
    runs = [(name, partial(measure_start, command, f"{name} failed")) for name, command in commands]
    in_turn(runs, 1, report)  # for kernels to be compiled and files to be read
    results = in_turn(runs, repetitions, report)

    def row(what: str, unit: str, value: Callable[[Start], float], failures: dict[str, str]) -> Row:
        sides = {name: Side(tuple(map(value, found))) for name, found in results.found.items()}
        return Row(f"{pair.name}, {what}", sides, unit, failures=failures)

    return [
        row("command to first output", "s", lambda start: start.seconds, results.failures),
        row("peak memory of 16 tokens", "MiB", lambda start: start.mebibytes, {}),
    ]


def neighbour_rows(pair: Pair, engines: Sequence[Engine], threads: int, repetitions: int, report: Report) -> list[Row]:
    """Decoding alone, and while another program computes on one core or on every one: speeds, and shares of alone."""
    test = SpeedTest("decode", pair.decode)
    cores = usable_cores()
    states = {"alone": [], "one core busy": cores[:1], "every core busy": cores}
    usual = [svdengine("dense"), *(engine for engine in engines if not engine.way)]

    def beside(engine: Engine, taken: Sequence[int]) -> Callable[[], Figure]:
        def run() -> Figure:
            with busy(taken):
                return engine.run(pair, test, threads)

        return run

    runs = [(f"{engine.name}, {state}", beside(engine, taken)) for state, taken in states.items() for engine in usual]
    results = in_turn(runs, repetitions, report)

    def speeds(name: str, state: str) -> tuple[float, ...]:
        return tuple(figure.tokens_per_second for figure in results.found.get(f"{name}, {state}", ()))

    rows = []
    for state in states:
        sides = {engine.name: Side(speeds(engine.name, state)) for engine in usual if speeds(engine.name, state)}
        failures = {
            engine.name: results.failures[f"{engine.name}, {state}"]
            for engine in usual
            if f"{engine.name}, {state}" in results.failures
        }
        rows.append(Row(f"{pair.name}, {test}, {state}", sides, failures=failures))
    return [*rows, *(_shares(rows[0], row) for row in rows[1:])]


def _shares(alone: Row, beside: Row) -> Row:
    """What is left of each engine's speed alone."""
    sides = {
        name: Side(tuple(value / alone.sides[name].median for value in side.values))
        for name, side in beside.sides.items()
        if name in alone.sides
    }
    return Row(beside.work, sides, "of alone")
