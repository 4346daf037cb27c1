"""Compare svdengine with llama.cpp and ik_llama.cpp, on this machine, with the same weights and threads.

    python -m svdengine.tools.bench_peers --llama-bench ~/llama.cpp/build/bin/llama-bench
    python -m svdengine.tools.bench_peers 7b/depth server --bits 8 --save results.json

A PART is MODEL/TEST, MODEL with its usual tests, or one of server, start and neighbours. The engines take turns, each
measurement in its own process, so that all see the same conditions and no engine's idle threads disturb another. A
part that fails is told, and the rest goes on. --save FILE keeps each row as it comes; what FILE has is not measured
again, so that an interrupted comparison goes on, and one in several pieces gives one table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from svdengine.errors import SvdEngineError
from svdengine.kernels.cores import default_threads
from svdengine.tools.peer_compare import compare
from svdengine.tools.peer_engines import Engine, llama_engines, svdengine
from svdengine.tools.peer_models import MODELS, TESTS, Pair, Shelf, bench_folder, prepare
from svdengine.tools.peer_notes import machine_notes
from svdengine.tools.peer_parts import neighbour_rows, server_rows, start_rows
from svdengine.tools.peer_run import measure_bandwidth
from svdengine.tools.peer_table import Row, as_dicts, from_dicts, markdown

Part = tuple[str, Callable[[], list[Row]]]  # its name, and what measures it

_OTHERS = ("server", "start", "neighbours")
_BESIDE = {"llama_server": "llama-server", "llama_completion": "llama-completion", "llama_quantize": "llama-quantize"}


def parts(options: Any) -> Iterator[Part]:
    """What was asked for, in order. Raises SvdEngineError, when a part is taken, where its files cannot be made."""
    shelf = Shelf(options.models, _report, options.relu, options.llama_quantize)
    engines = llama_engines(options.llama_bench, options.ik_llama_bench)
    models: dict[str, list[str]] = {}
    for name in options.parts:
        model, _, test = name.partition("/")
        if model in MODELS:
            models.setdefault(model, []).extend([test] if test else MODELS[model].tests)
    for model, tests in models.items():
        for bits in options.bits:
            for test in dict.fromkeys(tests):
                yield f"{model}/{test}, {bits} bits", _model_part(options, shelf, engines, model, test, bits)
    repetitions, threads = options.repetitions, options.threads

    def smollm2() -> Pair:
        return _shortened(prepare("smollm2", 8, shelf), options.quick)

    others: dict[str, Callable[[], list[Row]]] = {
        "server": lambda: server_rows(smollm2(), options, _report),
        "start": lambda: start_rows(smollm2(), options.llama_completion, threads, repetitions, _report),
        "neighbours": lambda: neighbour_rows(smollm2(), engines, threads, repetitions, _report),
    }
    for name in _OTHERS:
        if name in options.parts:
            yield name, others[name]


def _model_part(
    options: Any, shelf: Shelf, peers: Sequence[Engine], model: str, test: str, bits: Any
) -> Callable[[], list[Row]]:
    def run() -> list[Row]:
        pair = _shortened(prepare(model, bits, shelf), options.quick)
        ours = [svdengine(path) for path in (pair.paths if test == "decode" else pair.paths[:1])]
        return compare(pair, pair.test(test), [*ours, *peers], options.threads, options.repetitions, _report)

    return run


def _shortened(pair: Pair, quick: bool) -> Pair:
    if not quick:
        return pair
    return replace(pair, decode=pair.decode // 4, prefill=pair.prefill // 4, depth=pair.depth // 4)


def measure_parts(options: Any) -> tuple[list[Row], list[str]]:
    """All rows, those of `options.save` first, and what failed."""
    saved = _saved(options.save)
    failed = []
    bandwidth = measure_bandwidth(options.threads)
    for name, run in parts(options):
        if name in saved:
            _report(f"{name}: in {options.save} already")
            continue
        _report(f"== {name}")
        try:
            rows = run()
        except (SvdEngineError, OSError, ValueError) as error:
            _report(f"error: {error}")
            failed.append(f"{name} failed: {error}.")
            continue
        before, bandwidth = bandwidth, measure_bandwidth(options.threads)
        saved[name] = [replace(row, bandwidth=max(before, bandwidth)) for row in rows]
        if options.save is not None:
            _save(options.save, saved)
    return [row for rows in saved.values() for row in rows], failed


def _saved(path: Path | None) -> dict[str, list[Row]]:
    """The rows of each part in a file; none where it is not there. Raises SvdEngineError on any other file."""
    if path is None or not path.exists():
        return {}
    try:
        return {name: from_dicts(rows) for name, rows in json.loads(path.read_text(encoding="utf-8")).items()}
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise SvdEngineError(f"{path} is no file that --save wrote; move it away, or name another") from error


def _save(path: Path, parts: dict[str, list[Row]]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({name: as_dicts(rows) for name, rows in parts.items()}, indent=1), encoding="utf-8")
    partial.replace(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.repetitions < 1 or (options.threads is not None and options.threads < 1):
        parser.error("--threads and --repetitions must be at least 1")
    known = [*MODELS, *(f"{model}/{test}" for model in MODELS for test in TESTS), *_OTHERS]
    for part in options.parts:
        if part not in known:
            parser.error(f"there is no part {part!r}; there are {', '.join(known)}")
    options.parts = options.parts or [*MODELS, *_OTHERS]
    options.repetitions = 1 if options.quick else options.repetitions
    options.threads = options.threads or default_threads()
    try:
        options.models = options.models or bench_folder()
        _look_beside(options)
        if options.llama_bench is None and find_spec("llama_cpp") is None:
            _report("llama.cpp is not here; give --llama-bench PATH, or run: pip install 'svdengine[peers]'")
        rows, failed = measure_parts(options)
    except (SvdEngineError, OSError) as error:
        sys.exit(f"error: {error}")
    library = options.llama_bench is None and find_spec("llama_cpp") is not None
    notes = [*failed, *machine_notes(options.threads, options.repetitions, library)]
    print(json.dumps(as_dicts(rows), indent=1) if options.json else markdown(rows, notes))
    if failed and not rows:
        sys.exit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="svdengine.tools.bench_peers", description="Compare with other engines.")
    usual = "; ".join(f"{name}: {', '.join(model.tests)}" for name, model in MODELS.items())
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"by default all. {usual}. Also {', '.join(_OTHERS)}")
    parser.add_argument("--bits", type=int, nargs="+", choices=(8, 4), default=[8, 4], help="of weights (default: 8 4)")
    for option, help in (
        ("--llama-bench", "a build of llama.cpp's llama-bench; without it llama-cpp-python is taken"),
        ("--llama-server", "its server (default: beside llama-bench)"),
        ("--llama-completion", "its llama-completion, for `start` (default: beside llama-bench)"),
        ("--llama-quantize", "its quantiser (default: beside llama-bench)"),
        ("--ik-llama-bench", "a build of ik_llama.cpp's llama-bench; it is tried with -rtr 1 too"),
        ("--ik-llama-server", "its server"),
        ("--relu", "a GGUF file of a ReLU model of SmolLM2's shape, for the model `relu`"),
        ("--models", "folder where models are kept (default: in the user's cache)"),
        ("--save", "keep rows in this file, and do not measure again what it has"),
    ):
        parser.add_argument(option, type=Path, metavar="PATH", help=help)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="of `server` (default: 1 8 32)")
    parser.add_argument("--threads", type=int, help="of all engines (default: one a core)")
    parser.add_argument("--repetitions", type=int, default=3, help="of each measurement (default: 3)")
    parser.add_argument("--quick", action="store_true", help="a quarter of the tokens, and one repetition")
    parser.add_argument("--json", action="store_true", help="print a list of rows instead of the table")
    return parser


def _look_beside(options: Any) -> None:
    """Take what lies beside llama-bench for the programs of llama.cpp that are not named."""
    for option, name in _BESIDE.items():
        if getattr(options, option) is None and options.llama_bench is not None:
            path = options.llama_bench.with_name(name)
            setattr(options, option, path if path.exists() else None)


def _report(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
