"""Compiles the AscendC kernels, or kernels that break a rule, with g++ against the shim, and runs them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import DTypeLike, NDArray
from shared_once import made_once

HERE = Path(__file__).parent
OPS = HERE.parents[1] / "kernels" / "ascend" / "ops"
BROKEN_RULE = 3  # exit code of shim/failure.h

FLAGS = ["-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

Argument = str | int | float | None  # name of a buffer, number, or a null address


def compile_host(source: Path, folder: Path, *options: str) -> Path:
    """The executable of a source that uses the shim, with address and undefined-behaviour sanitizers."""
    program = folder / source.stem
    paths = [f"-I{folder}" for folder in (HERE / "shim", HERE, OPS)]
    command = ["g++", *FLAGS, *SANITIZERS, *options, *paths, str(source), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


def compile_library(source: Path, folder: Path, *options: str) -> Path:
    """The shared library of a source that uses the shim. Python could not load one with sanitizers."""
    library = folder / f"lib{source.stem}.so"
    paths = [f"-I{folder}" for folder in (HERE / "shim", HERE, OPS)]
    command = ["g++", *FLAGS, *options, "-shared", "-fPIC", *paths, str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


def need_compiler() -> None:
    """Skip the test when there is no compiler."""
    if shutil.which("g++") is None:
        pytest.skip("g++ was not found")


def compiled(name: str, factory: pytest.TempPathFactory, *options: str) -> Path:
    """The executable of a source of this folder, made once a run. Skips the test when there is no compiler."""
    need_compiler()

    def make(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "empty.cpp").write_text("int main() {}\n")
        command = ["g++", *SANITIZERS, str(folder / "empty.cpp"), "-o", str(folder / "empty")]
        if subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("g++ has no address and undefined-behaviour sanitizers")
        compile_host(HERE / name, folder, *options)

    return made_once(factory, f"{name}{''.join(options)}", make) / Path(name).stem


def compiled_library(name: str, factory: pytest.TempPathFactory, *options: str) -> Path:
    """The shared library of a source of this folder, likewise."""
    need_compiler()

    def make(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        compile_library(HERE / name, folder, *options)

    return made_once(factory, f"lib{name}{''.join(options)}", make) / f"lib{Path(name).stem}.so"


@dataclass
class Script:
    """Device buffers and launches, in order, as shim/script.h reads them; `run` gives the dumped buffers."""

    program: Path
    slack: int = 0  # elements of four bytes that each buffer, and each segment of a list, has more than is wanted
    text: list[bytes] = field(default_factory=list)
    dumps: list[tuple[tuple[int, ...], np.dtype, int]] = field(default_factory=list)  # and bytes that follow
    shapes: dict[str, tuple[tuple[int, ...], np.dtype]] = field(default_factory=dict)
    launches: int = 0

    def buffer(self, name: str, array: NDArray) -> None:
        """A buffer with content."""
        array = np.ascontiguousarray(array)
        more = bytes(4 * self.slack)
        self.text.append(f"buffer {name} {array.nbytes + len(more)}\n".encode() + array.tobytes() + more)
        self.shapes[name] = (array.shape, array.dtype)

    def empty(self, name: str, shape: Sequence[int], dtype: DTypeLike) -> None:
        """A buffer that a kernel must fill: NaN, or -1."""
        dtype = np.dtype(dtype)
        self.buffer(name, np.full(shape, np.nan if dtype.kind == "f" else -1, dtype))

    def launch(self, kernel: str, blocks: int, *arguments: Argument, order: int = 0) -> None:
        """Run a kernel. order: 0 blocks ascending, 1 descending, else the seed of a shuffle."""
        self.launches += 1
        words = [_word(argument) for argument in arguments]
        self.text.append(" ".join(["launch", kernel, str(blocks), str(order), *words, "\n"]).encode())

    def dump(self, *names: str) -> None:
        """Ask for buffers as they are now."""
        for name in names:
            self.text.append(f"dump {name}\n".encode())
            self.dumps.append((*self.shapes[name], 4 * self.slack))

    def used(self) -> None:
        """Ask for the UB bytes of a block of each launch so far."""
        self.text.append(b"used\n")
        self.dumps.append(((self.launches,), np.dtype(np.uint64), 0))

    def execute(self) -> subprocess.CompletedProcess[bytes]:
        """Run the process, whatever comes of it."""
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
        return subprocess.run([self.program], input=b"".join(self.text), capture_output=True, env=environment)

    def run(self) -> list[NDArray]:
        """Run the process and return what was asked for, in order."""
        done = self.execute()
        assert done.returncode == 0, done.stderr.decode()
        arrays, at = [], 0
        for shape, dtype, more in self.dumps:
            count = int(np.prod(shape, dtype=np.int64))
            arrays.append(np.frombuffer(done.stdout, dtype, count, at).reshape(shape))
            at += count * dtype.itemsize + more
        assert at == len(done.stdout)
        return arrays


def _word(argument: Argument) -> str:
    if argument is None:
        return "@"
    if isinstance(argument, str):
        return f"@{argument}"
    return f"i{argument}" if isinstance(argument, int) else f"f{float(argument)!r}"
