"""The first run on an NVIDIA GPU: what has never run is tried, then measured, in the order of what it tells.

    python -m svdengine.tools.first_gpu_run -o FOLDER --prepare sm_90a   # before, where there is no GPU
    python -m svdengine.tools.first_gpu_run -o FOLDER                    # with one

Each part runs in a process of its own under a time limit. One that fails or takes too long is noted, and the next one
follows. After each part FOLDER/first_gpu_run.json and FOLDER/first_gpu_run.md are written anew, with the device and the
date. `--prepare` compiles all kernels for a card into FOLDER/kernels, and writes the models that are measured: bring
the folder along, and nothing is compiled or written on the machine with the GPU. The tests of kernels run too where
`--tests` names their folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from svdengine.errors import SvdEngineError
from svdengine.kernels.brought_along import ENVIRONMENT
from svdengine.tools.first_gpu_parts import measured_path, models

_SVDENGINE = (sys.executable, "-m", "svdengine")
_PARTS = (sys.executable, "-m", "svdengine.tools.first_gpu_parts")
_TAIL = 4000  # characters of what a part said that are kept
_SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
_HEADER = ("| part | result | s | of s | found |", "| --- | --- | ---: | ---: | --- |")
_PROFILED = "heads|normed|activated|predicted|gemv|down|attention|project|choose|add_parts"


@dataclass(frozen=True)
class Setting:
    """Where a run works."""

    folder: Path
    tests: Path | None  # the folder tests/kernels/cuda

    @property
    def work(self) -> Path:
        """For models."""
        return self.folder / "work"


Command = tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """Commands that run one after another within a time limit; or why they cannot, as a text."""

    name: str
    limit: float  # seconds
    answers: str
    commands: Callable[[Setting], Sequence[Command] | str]


@dataclass(frozen=True)
class Outcome:
    """What came of a part."""

    name: str
    answers: str
    result: str  # done, failed, out of time, or left out
    seconds: float
    limit: float
    said: tuple[Any, ...]  # of each command: its JSON, or the end of what it printed


def every_part() -> list[Part]:
    """All parts in their order."""
    return [
        Part("machine", 30, "driver, capability, read bandwidth", lambda s: [(*_SVDENGINE, "devices", "--json")]),
        Part("formats", 90, "numerics of every format against the reference", lambda s: [_own("formats", s)]),
        Part("kernel tests", 60, "numerics of single kernels", lambda s: _pytest(s, _KERNEL_TESTS)),
        Part("model tests", 90, "graphs, split models, whole models", lambda s: _pytest(s, _MODEL_TESTS)),
        Part("sanitizers", 80, "races and accesses that a simulator cannot see", _sanitizers),
        Part("models", 120, "what the next parts measure is written", lambda s: [_own("models", s)]),
        Part("kernels", 100, "shares of bandwidth; the sparse FFN against the dense one", lambda s: [_KERNELS]),
        Part(
            "decode", 90, "the ratio of steps, launches and gaps",
            lambda s: [_bench(s, "f16", "-p", "0", "-n", "128"), _bench(s, "f16", "-p", "0", "-n", "64", "-d", "4096")],
        ),
        Part(
            "prefill", 60, "attention of prompts",
            lambda s: [_bench(s, "f16", "-n", "0", "-p", str(length), ffn="dense") for length in (2048, 8192)],
        ),
        Part("profile", 60, "where single kernels are bound", _profile),
        Part(
            "bus", 40, "rows that lie in host memory",
            lambda s: [_bench(s, "f16", "-p", "0", "-n", "32", "--gpu-memory", "2G")],
        ),
        Part("memory", 30, "whether memory comes back", lambda s: [_own("memory", s)]),
        Part(
            "batches", 40, "batches of 4-bit weights",
            lambda s: [_bench(s, "q4", "-p", "0", "-n", "32", "--parallel", "8", "--parallel", "32", ffn="dense")],
        ),
    ]  # fmt: skip


_KERNEL_TESTS = ("products", "sparse", "intrinsics", "device_sampling", "cuda_formats")
_MODEL_TESTS = ("executor", "executor_memory", "split", "llm_on_cuda", "soak")
_TIMINGS = ("--formats", "f16", "q8", "q4", "--layers", "8", "--json")
_KERNELS: Command = (sys.executable, "-m", "svdengine.tools.time_cuda_kernels", *_TIMINGS)


def _own(name: str, setting: Setting) -> Command:
    return (*_PARTS, name, "--work", str(setting.work))


def _bench(setting: Setting, model: str, *options: str, ffn: str = "both") -> Command:
    path = str(measured_path(setting.work, model))
    return (*_SVDENGINE, "bench", path, "--device", "cuda", "--ffn", ffn, "-r", "3", "--json", *options)


def _pytest(setting: Setting, names: Sequence[str]) -> Sequence[Command] | str:
    if setting.tests is None:
        return "no --tests was given"
    files = [str(setting.tests / f"test_{name}.py") for name in names]
    return [(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files)]


def _sanitizers(setting: Setting) -> Sequence[Command] | str:
    program = shutil.which("compute-sanitizer")
    if program is None:
        return "there is no compute-sanitizer here"
    run = _own("generation", setting)
    return [(program, "--tool", tool, "--error-exitcode", "9", *run) for tool in _SANITIZERS]


def _profile(setting: Setting) -> Sequence[Command] | str:
    program = shutil.which("ncu")
    if program is None:
        return "there is no ncu here"
    bench = (*_SVDENGINE, "bench", str(measured_path(setting.work, "f16")), "--device", "cuda", "--ffn", "sparse")
    run = (*bench, "-p", "0", "-n", "2", "-r", "1")
    return [(program, "--kernel-name", f"regex:{_PROFILED}", "--launch-count", "24", "--set", "basic", *run)]


def run_parts(setting: Setting, parts: Sequence[Part], report: Callable[[str], None] = print) -> list[Outcome]:
    """Run parts one after another, and write what came of them after each."""
    setting.folder.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for part in parts:
        report(f"{part.name}, {part.limit:.0f} s at most: {part.answers}")
        outcomes.append(run_part(setting, part))
        report(f"  {outcomes[-1].result} after {outcomes[-1].seconds:.1f} s")
        write_report(setting, outcomes)
    return outcomes


def run_part(setting: Setting, part: Part) -> Outcome:
    """Run the commands of a part under its time limit."""
    begin, said, result = time.monotonic(), [], "done"
    commands = part.commands(setting)
    if isinstance(commands, str):
        return Outcome(part.name, part.answers, "left out", 0.0, part.limit, (commands,))
    for command in commands:
        left = part.limit - (time.monotonic() - begin)
        code, text = _run(setting, command, max(left, 0.1))
        said.append(_parsed(text))
        if code is None:
            result = "out of time"
            break
        if code != 0:
            result = "failed"  # the others of the part may still tell something
    return Outcome(part.name, part.answers, result, round(time.monotonic() - begin, 1), part.limit, tuple(said))


def _run(setting: Setting, command: Command, limit: float) -> tuple[int | None, str]:
    """Run a command, and everything that it starts, for so many seconds: its exit code, None where time ran out."""
    environment = dict(os.environ)
    kernels = setting.folder / "kernels"
    if kernels.is_dir():
        environment[ENVIRONMENT] = os.pathsep.join(filter(None, (str(kernels), environment.get(ENVIRONMENT, ""))))
    try:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return 1, f"{command[0]}: {error}"
    try:
        text, _ = process.communicate(timeout=limit)
        return process.returncode, text
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # a session of its own: nothing else is in it
        text, _ = process.communicate()
        return None, text


def _parsed(text: str) -> Any:
    """The JSON that a command printed at the end, or else the end of its text."""
    for start in (0, *(at + 1 for at, letter in enumerate(text) if letter == "\n")):
        if text[start : start + 1] in ("{", "["):
            try:
                return json.loads(text[start:])
            except ValueError:
                continue
    return text[-_TAIL:]


def write_report(setting: Setting, outcomes: Sequence[Outcome]) -> None:
    """Write what is known so far as JSON and as a table."""
    device = device_of(outcomes)
    found = {
        "device": device,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "parts": [asdict(outcome) for outcome in outcomes],
    }
    (setting.folder / "first_gpu_run.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    lines = [
        f"{device}, {found['date']}",
        "",
        "| part | result | s | of s | found |",
        "| --- | --- | ---: | ---: | --- |",
    ]
    lines += [
        f"| {o.name} | {o.result} | {o.seconds:.1f} | {o.limit:.0f} | {'; '.join(filter(None, map(_short, o.said)))} |"
        for o in outcomes
    ]
    (setting.folder / "first_gpu_run.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def device_of(outcomes: Sequence[Outcome]) -> str:
    """The GPU that `svdengine devices` named."""
    for outcome in outcomes:
        for said in outcome.said:
            if isinstance(said, dict) and said.get("gpus"):
                gpu = said["gpus"][0]
                return f"{gpu['name']}, CUDA {gpu['driver_cuda']} of the driver"
    return "no GPU was found"


def _short(said: Any) -> str:
    """What goes into a cell of the table."""
    if isinstance(said, str):
        return " ".join(said.split())[-160:].replace("|", "/") or "nothing was said"
    if isinstance(said, list):  # rows of bench
        return "; ".join(_rate(row) for row in said if isinstance(row, dict) and "test" in row)
    if "timings" in said:
        return "; ".join(f"{timing['name']} {timing['of_bandwidth']:.0%}" for timing in said["timings"])
    if "gpus" in said:
        rates = [gpu["read_gb_per_second"] for gpu in said["gpus"]]
        return ", ".join(f"{rate:.0f} GB/s" for rate in rates if rate) or "not measured"
    return ", ".join(f"{name} {value:.3g}" for name, value in list(said.items())[:4] if isinstance(value, int | float))


def _rate(row: dict[str, Any]) -> str:
    speed, bandwidth = f"{row['tokens_per_second']:.1f} t/s", f"{row['gb_per_second']:.0f} GB/s"
    return f"{row['test']} {row['ffn']} {speed}, {bandwidth}"


def prepare(setting: Setting, targets: Sequence[str]) -> None:
    """Compile what a run needs for some cards, and write its models. Raises SvdEngineError where it cannot be done."""
    from svdengine.commands.compile import compile_cuda_kernels
    from svdengine.tools.planned_kernels import kernels_of_first_run

    print(compile_cuda_kernels(kernels_of_first_run(), targets, setting.folder / "kernels"), flush=True)
    setting.work.mkdir(parents=True, exist_ok=True)
    sizes = models(setting.work, None)
    print(f"wrote {len(sizes)} models of {sum(sizes.values()) / 1e9:.1f} GB into {setting.work}")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="svdengine.tools.first_gpu_run", description=__doc__.splitlines()[0])
    names = [part.name for part in every_part()]
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="for results and models")
    parser.add_argument("--tests", type=Path, metavar="FOLDER", help="tests/kernels/cuda of the same sources")
    parser.add_argument("--only", nargs="+", choices=names, metavar="PART", help=f"of {', '.join(names)}")
    parser.add_argument("--prepare", nargs="+", metavar="TARGET", help="compile kernels for sm_90a, ... and do no more")
    options = parser.parse_args(arguments)
    setting = Setting(options.output.resolve(), options.tests.resolve() if options.tests else None)
    try:
        if options.prepare:
            prepare(setting, options.prepare)
            return
        outcomes = run_parts(setting, [part for part in every_part() if not options.only or part.name in options.only])
    except (SvdEngineError, OSError) as error:
        sys.exit(f"error: {error}")
    print((setting.folder / "first_gpu_run.md").read_text(encoding="utf-8"))
    sys.exit(0 if all(outcome.result in ("done", "left out") for outcome in outcomes) else 1)


if __name__ == "__main__":
    main()
