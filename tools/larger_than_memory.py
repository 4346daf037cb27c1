"""Decode a model whose file is larger than the memory it is left: tokens a second, and what storage reads for each.

    python -m svdengine.tools.larger_than_memory planted.svdp --leave 4.2

A child process takes memory until only `--leave` GiB of the machine's are available, page cache included, and gives it
back at the end. So the model's process and the pages of its file share what is left. Under a memory limit of a control
group (systemd-run --scope -p MemoryMax=4G ...) leave `--leave` out: then that limit is the memory.

The child takes no more than that, and gives memory back whenever less than `--floor` GiB are available, because other
programs need it; it is also the first process that the system would end. Every measurement is `svdengine bench
--faults` in a process of its own, after the file has been dropped from the page cache.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import select
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from svdengine.files.residency import usable_memory

GIB = 1 << 30
_PIECE = 64 << 20  # bytes that are taken or given back at once
_WATCH = 0.2  # seconds between two looks at the memory
_COLUMNS = (
    "test",
    "ffn",
    "memory GiB",
    "file GiB",
    "tokens/s",
    "major faults/token",
    "pages read/token",
    "MB read/token",
    "MB used/token",
)


class Holder:
    """Memory that is taken from the machine, in pieces."""

    def __init__(self) -> None:
        self._pieces: list[mmap.mmap] = []

    def take(self, leave: int) -> None:
        """Take memory until no more than `leave` bytes are available."""
        while _available() > leave:
            piece = mmap.mmap(-1, _PIECE)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                piece.madvise(mmap.MADV_HUGEPAGE)  # taken several times as fast
            for at in range(0, _PIECE, mmap.PAGESIZE):
                piece[at] = 1
            self._pieces.append(piece)

    def yield_to(self, floor: int) -> None:
        """Give memory back while less than `floor` bytes are available."""
        while self._pieces and _available() < floor:
            self._pieces.pop().close()

    @property
    def size(self) -> int:
        """Bytes that are held."""
        return _PIECE * len(self._pieces)


def hold(leave: int, floor: int, commands: BinaryIO) -> None:
    """Hold memory until `commands` ends; a line is printed when it is taken, and when some had to be given back."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    holder = Holder()
    holder.take(leave)
    held = holder.size
    print(f"holds {held / GIB:.2f} GiB", flush=True)
    while not select.select([commands], [], [], _WATCH)[0]:
        holder.yield_to(floor)
        if holder.size != held:
            held = holder.size
            print(f"others need memory: holds {held / GIB:.2f} GiB", file=sys.stderr, flush=True)


@contextmanager
def left_memory(leave: int | None, floor: int) -> Iterator[None]:
    """Within the block, `leave` bytes of memory are available; None: as many as there are."""
    if leave is None:
        yield
        return
    command = [sys.executable, "-m", "svdengine.tools.larger_than_memory", "--hold", str(leave), str(floor)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None and child.stdout is not None
        try:
            if not child.stdout.readline():
                raise OSError("memory could not be taken")
            yield
        finally:
            child.stdin.close()


def measure(model: Path, ffn: str, options: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of `svdengine bench` for one path, from a cold page cache. Raises OSError when it fails."""
    drop_pages(model)
    command = [sys.executable, "-m", "svdengine", "bench", str(model), "--ffn", ffn, "--faults", "--json", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)} failed")
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def drop_pages(path: Path) -> None:
    """Take a file out of the page cache, where nobody has it mapped."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # only what is on storage already can be dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def table(rows: Sequence[dict[str, Any]], size: int) -> str:
    """The measurements as a markdown table; `size` of the file in bytes, and `memory` in each row."""
    cells = [
        (
            row["test"],
            row["ffn"],
            f"{row['memory'] / GIB:.2f}",
            f"{size / GIB:.2f}",
            f"{row['tokens_per_second']:.3f}",
            f"{row['major_faults_per_token']:,.0f}",
            f"{row['disk_bytes_per_token'] / mmap.PAGESIZE:,.0f}",
            f"{row['disk_bytes_per_token'] / 1e6:,.0f}",
            f"{row['bytes_per_token'] / 1e6:,.0f}",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(_COLUMNS, *cells, strict=True)]
    lines = [_COLUMNS, ["-" * width for width in widths], *cells]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="svdengine.tools.larger_than_memory", description="Measure a model that is larger than memory."
    )
    parser.add_argument("model", type=Path, nargs="?", help="a .svdp file with a predictor")
    parser.add_argument("--leave", type=float, metavar="GIB", help="memory that is left; default: all there is")
    parser.add_argument("--floor", type=float, default=3.0, metavar="GIB", help="never leave less (default: 3)")
    parser.add_argument("--ffn", nargs="+", choices=("auto", "dense", "sparse"), default=("dense", "sparse"))
    parser.add_argument("--pp", type=int, default=0, metavar="N", help="tokens of a prompt to read (default: 0)")
    parser.add_argument("--tg", type=int, default=4, metavar="N", help="tokens to decode (default: 4)")
    parser.add_argument("--hold", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.hold:
        hold(options.hold[0], options.hold[1], sys.stdin.buffer)
        return
    try:
        print(_report(options))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def _report(options: argparse.Namespace) -> str:
    if options.model is None:
        raise ValueError("name a model file")
    size, leave = options.model.stat().st_size, None if options.leave is None else int(options.leave * GIB)
    if leave is not None and leave < options.floor * GIB:
        raise ValueError(f"{options.leave} GiB would be left, less than the floor of {options.floor}")
    common = ["--pp", str(options.pp), "--tg", str(options.tg), "--repetitions", "1"]
    rows: list[dict[str, Any]] = []
    for ffn in options.ffn:
        with left_memory(leave, int(options.floor * GIB)):  # anew, since other programs come and go
            memory = _available()
            if size < 2 * memory:
                raise ValueError(
                    f"the file has {size / GIB:.2f} GiB, expected twice the {memory / GIB:.2f} that are left"
                )
            rows += ({**row, "memory": memory} for row in measure(options.model, ffn, common))
    return table(rows, size)


def _available() -> int:
    memory = usable_memory()
    if memory is None:
        raise OSError("this system does not say how much memory is available")
    return memory


if __name__ == "__main__":
    main()
