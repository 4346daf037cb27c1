"""Compare the speed of svdengine with that of llama.cpp, on this machine, with the same weights and threads.

    python -m svdengine.tools.bench_peers --threads 2 --work smollm2 7b

The engines take turns, each measurement in its own process, so that both see the same conditions and neither's idle
threads disturb the other. Batch size 1; only the calls that run the model are timed, after a warm-up.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from svdengine import __version__
from svdengine.errors import SvdEngineError
from svdengine.tools.llama_cpp_model import llama_cpp_version
from svdengine.tools.peer_models import WORKS, Pair, prepare
from svdengine.tools.peer_run import Engine, measure
from svdengine.tools.peer_table import Row, Side, as_dicts, markdown

_ENGINES: tuple[Engine, Engine] = ("llama.cpp", "svdengine")


def compare(pair: Pair, threads: int, repetitions: int) -> list[Row]:
    """A row for decode and one for prefill. Raises SvdEngineError when an engine fails."""
    results: dict[Engine, list[dict[str, Any]]] = {engine: [] for engine in _ENGINES}
    for repetition in range(repetitions):
        for engine in _ENGINES:
            _report(f"{pair.name}: {engine}, {repetition + 1} of {repetitions}")
            path = pair.gguf if engine == "llama.cpp" else pair.svdp
            results[engine].append(measure(engine, threads, path, pair.decode, pair.prefill))

    def side(engine: Engine, test: str, tokens: int) -> Side:
        found = results[engine]
        weight_bytes = found[0]["weight_bytes"] if test == "decode" else None
        return Side(tuple(result[test] for result in found), tokens, weight_bytes)

    return [
        Row(f"{pair.name}, {test} {tokens}", *(side(engine, test, tokens) for engine in _ENGINES))
        for test, tokens in (("decode", pair.decode), ("prefill", pair.prefill))
        if tokens
    ]


def machine_notes(threads: int, repetitions: int) -> list[str]:
    """What the numbers depend on: versions, processor, settings."""
    return [
        f"{cpu_name()}, {threads} threads, medians of {repetitions} ± standard deviation.",
        f"svdengine {__version__}; llama-cpp-python {llama_cpp_version()}.",
    ]


def cpu_name() -> str:
    """The processor as the system calls it."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="svdengine.tools.bench_peers", description="Compare with llama.cpp.")
    parser.add_argument("--work", nargs="+", choices=WORKS, default=list(WORKS), help="models to compare on")
    parser.add_argument("--threads", type=int, help="of both (default: one a core)")
    parser.add_argument("--repetitions", type=int, default=5, help="of each measurement (default: 5)")
    parser.add_argument("--quick", action="store_true", help="a quarter of the tokens, and one repetition")
    parser.add_argument("--json", action="store_true", help="print a list of rows instead of the table")
    options = parser.parse_args(arguments)
    if options.repetitions < 1 or (options.threads is not None and options.threads < 1):
        parser.error("--threads and --repetitions must be at least 1")
    repetitions = 1 if options.quick else options.repetitions
    threads = options.threads or _cores()
    try:
        notes = machine_notes(threads, repetitions)
        pairs = [pair for work in options.work for pair in prepare(work, _report)]
        if options.quick:
            pairs = [replace(pair, decode=pair.decode // 4, prefill=pair.prefill // 4) for pair in pairs]
        rows, bandwidths = [], [_bandwidth(threads)]
        for pair in pairs:
            rows += compare(pair, threads, repetitions)
            bandwidths.append(_bandwidth(threads))  # again, since other work on the machine takes its share
        bandwidth = max(bandwidths)
    except (SvdEngineError, OSError) as error:
        sys.exit(f"error: {error}")
    print(json.dumps(as_dicts(rows, bandwidth), indent=1) if options.json else markdown(rows, bandwidth, notes))


def _bandwidth(threads: int) -> float:
    gb_per_second: float = measure("bandwidth", threads)["gb_per_second"]
    return gb_per_second


def _cores() -> int:
    from svdengine.kernels.cores import default_threads

    return default_threads()


def _report(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
