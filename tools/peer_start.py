"""How long a program takes to its first output, and how much memory it has at most: command lines, each run alone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from svdengine.errors import SvdEngineError

_PROMPT, _TOKENS, _CONTEXT = "Once upon a time", 16, 4096


class Start(NamedTuple):
    """What one run took."""

    seconds: float  # from the command to the first byte of the answer
    # Of memory that was resident at most, the model file's pages among them; the system counts from what this process
    # has, which a child begins with.
    mebibytes: float


def svdengine_command(model: Path, threads: int) -> list[str]:
    """svdengine, generating a short answer."""
    options = ["-p", _PROMPT, "-n", str(_TOKENS), "--temperature", "0", "--context", str(_CONTEXT)]
    return [sys.executable, "-m", "svdengine", "generate", str(model), *options, "--threads", str(threads)]


def llama_completion_command(program: Path, model: Path, threads: int) -> list[str]:
    """llama.cpp's llama-completion, generating as much; without the prompt, its first output is the first token."""
    options = ["-p", _PROMPT, "-n", str(_TOKENS), "--temp", "0", "-c", str(_CONTEXT), "-t", str(threads)]
    return [str(program), "-m", str(model), *options, "-no-cnv", "--no-display-prompt"]


def measure_start(command: Sequence[str], failed: str) -> Start:
    """Run a command to its end. Raises SvdEngineError that begins with `failed` when it prints nothing, or fails."""
    began = time.perf_counter()
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError as error:
        raise SvdEngineError(f"{failed}: {error.strerror or error}") from error
    with process:
        assert process.stdout is not None
        seen = b""
        while not seen.strip() and (byte := os.read(process.stdout.fileno(), 1)):
            seen += byte
        seconds = time.perf_counter() - began
        while os.read(process.stdout.fileno(), 1 << 16):
            pass
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or not seen.strip():
        raise SvdEngineError(f"{failed}: it ended with code {process.returncode}, and its first output was {seen!r}")
    per_mebibyte = 1 << 20 if sys.platform == "darwin" else 1 << 10  # of the unit in which the system counts
    return Start(seconds, usage.ru_maxrss / per_mebibyte)
