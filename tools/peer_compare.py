"""Engines in turn on one work: each repetition is a process of its own, so that all see the same conditions."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from svdengine.errors import SvdEngineError
from svdengine.tools.peer_engines import SVDENGINE, Engine
from svdengine.tools.peer_models import Pair, Report
from svdengine.tools.peer_run import Figure, SpeedTest
from svdengine.tools.peer_table import Row, Side

Result = TypeVar("Result")


@dataclass
class Results(Generic[Result]):
    """What was measured, by what was measured, and what failed."""

    found: defaultdict[str, list[Result]] = field(default_factory=lambda: defaultdict(list))
    failures: dict[str, str] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)  # no longer measured, though nothing failed


def in_turn(
    runs: Sequence[tuple[str, Callable[[], Result]]],
    repetitions: int,
    report: Report,
    between: Callable[[Results[Result]], None] = lambda results: None,
) -> Results[Result]:
    """Call all of the named `runs` in turn, `repetitions` times. One that fails is reported, and not called again.

    `between` is called with what was found so far after each turn.
    """
    results: Results[Result] = Results()
    for repetition in range(repetitions):
        for name, run in runs:
            if name in results.failures or name in results.left_out:
                continue
            report(f"{name}, {repetition + 1} of {repetitions}")
            try:
                results.found[name].append(run())
            except SvdEngineError as error:
                report(f"error: {error}")
                results.failures[name] = str(error)
                results.found.pop(name, None)
        between(results)
    return results


def compare(
    pair: Pair, test: SpeedTest, engines: Sequence[Engine], threads: int, repetitions: int, report: Report
) -> list[Row]:
    """A row for each of our paths, with all peers beside it. Of a peer's ways the fastest goes on after one turn."""

    def run(engine: Engine) -> Callable[[], Figure]:
        return lambda: engine.run(pair, test, threads)

    def drop_slower_ways(results: Results[Figure]) -> None:
        for name in {engine.name for engine in engines} - {SVDENGINE}:
            ways = [str(engine) for engine in engines if engine.name == name and str(engine) in results.found]
            ways.sort(key=lambda way: -_median(results.found[way]))
            results.left_out.update(ways[1:])

    report(f"{pair.name}, {test}")
    runs = [(str(engine), run(engine)) for engine in engines]
    results = in_turn(runs, repetitions, report, drop_slower_ways)
    peers = _peers(engines, results)
    ours = [engine for engine in engines if engine.name == SVDENGINE]
    failures = {name: reason for engine in engines for name, reason in _failure(engine, results, peers)}
    rows = []
    for engine in ours:
        key = str(engine)
        sides = {SVDENGINE: _side(engine, results.found[key])} if results.found.get(key) else {}
        failed = {**failures, **({SVDENGINE: results.failures[key]} if key in results.failures else {})}
        work = f"{pair.name}, {test}" + (f", {engine.way}" if len(ours) > 1 else "")
        rows.append(Row(work, {**sides, **peers}, failures=failed))
    return rows


def _peers(engines: Iterable[Engine], results: Results[Figure]) -> dict[str, Side]:
    """The fastest way of each peer."""
    sides: dict[str, Side] = {}
    for engine in engines:
        figures = results.found.get(str(engine))
        if engine.name == SVDENGINE or not figures:
            continue
        side = _side(engine, figures)
        if engine.name not in sides or side.median > sides[engine.name].median:
            sides[engine.name] = side
    return sides


def _failure(engine: Engine, results: Results[Figure], peers: dict[str, Side]) -> list[tuple[str, str]]:
    """A peer's failure, where none of its ways worked."""
    if engine.name == SVDENGINE or engine.name in peers or str(engine) not in results.failures:
        return []
    return [(engine.name, results.failures[str(engine)])]


def _side(engine: Engine, figures: Sequence[Figure]) -> Side:
    read = [figure.bytes_per_token for figure in figures if figure.bytes_per_token is not None]
    return Side(
        tuple(figure.tokens_per_second for figure in figures), statistics.fmean(read) if read else None, engine.way
    )


def _median(figures: Sequence[Figure]) -> float:
    return statistics.median(figure.tokens_per_second for figure in figures)
