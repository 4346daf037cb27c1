"""What is compared: svdengine by its paths, llama-cpp-python, and builds of llama-bench."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from svdengine.errors import SvdEngineError
from svdengine.tools.peer_models import Pair
from svdengine.tools.peer_run import FfnPath, Figure, SpeedTest, gguf_bytes_per_token, measure
from svdengine.tools.run_program import run_program

SVDENGINE, LLAMA_CPP, IK = "svdengine", "llama.cpp", "ik_llama.cpp"


@dataclass(frozen=True)
class Engine:
    """One way to run a model. Of a peer's several ways the fastest counts."""

    name: str  # svdengine, or of the peer
    way: str  # a path of svdengine's, or options of a peer; empty: the usual one
    run: Callable[[Pair, SpeedTest, int], Figure]  # with so many threads; raises SvdEngineError

    def __str__(self) -> str:
        return f"{self.name} {self.way}".rstrip()


def svdengine(path: FfnPath) -> Engine:
    """svdengine on the CPU."""
    return Engine(SVDENGINE, path, lambda pair, test, threads: measure(SVDENGINE, threads, pair.svdp, test, path))


def llama_engines(llama_bench: Path | None, ik_llama_bench: Path | None) -> list[Engine]:
    """The peers that are there: builds of llama-bench, or llama-cpp-python where there is none of llama.cpp."""
    engines = []
    if llama_bench is not None:
        engines.append(Engine(LLAMA_CPP, "", partial(run_llama_bench, llama_bench, ())))
    elif find_spec("llama_cpp") is not None:
        engines.append(Engine(LLAMA_CPP, "", _llama_cpp_python))
    if ik_llama_bench is not None:
        ways = {way: partial(run_llama_bench, ik_llama_bench, tuple(way.split())) for way in ("", "-rtr 1")}
        engines += [Engine(IK, way, run) for way, run in ways.items()]
    return engines


def _llama_cpp_python(pair: Pair, test: SpeedTest, threads: int) -> Figure:
    return measure("llama-cpp-python", threads, pair.gguf, test)


def run_llama_bench(program: Path, options: tuple[str, ...], pair: Pair, test: SpeedTest, threads: int) -> Figure:
    """One repetition of a test by llama-bench, llama.cpp's or that of ik_llama.cpp, which warms up first.

    Raises SvdEngineError when it fails, or does not print what was asked for.
    """
    failed = f"{program.name} failed on {pair.gguf.name}"
    depth = ["-d", str(test.depth)] if test.depth else []
    if test.depth and "-gp " in run_program([str(program), "--help"], failed):  # ik_llama.cpp has no -d
        depth = ["-gp", f"{test.depth},{test.tokens}"]
    counts = {"prefill": test.tokens, "decode": 0}[test.kind], {"prefill": 0, "decode": test.tokens}[test.kind]
    if "-gp" in depth:
        counts = 0, 0
    command = [str(program), "-m", str(pair.gguf), "-t", str(threads), "-r", "1", "-o", "json", *options]
    output = run_program([*command, "-p", str(counts[0]), "-n", str(counts[1]), *depth], failed)
    try:
        (row,) = json.loads(output[output.index("[") :])
        speed = float(row["avg_ts"])
    except (ValueError, KeyError, TypeError) as error:
        raise SvdEngineError(f"{failed}: expected a list of one row with avg_ts, found {output[:200]!r}") from error
    return Figure(speed, gguf_bytes_per_token(pair.gguf) if test.kind == "decode" else None)
