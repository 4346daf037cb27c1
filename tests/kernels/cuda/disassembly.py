"""Machine code as text. nvdisasm takes half a second to start and little for a kernel: it is given many at once."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence

from cuda import pathfinder

_ADDRESS = re.compile(r"/\*([0-9a-f]{4,})\*/")
_BRANCH = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?BRA\b.*\b(0x([0-9a-f]+))")


def output(tool: str, *arguments: str) -> str:
    """What a program of CUDA prints. Raises FileNotFoundError where it is not installed."""
    program = pathfinder.find_nvidia_binary_utility(tool)
    if program is None:
        raise FileNotFoundError(f"{tool} is not installed")
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout


def disassembled(cubins: Sequence[bytes], target: str) -> list[str]:
    """The instructions of each of some kernels for a target (sm_90a), as nvdisasm prints them for a kernel alone.

    It is given what the processor executes, one kernel behind the other, and knows no labels then: they are put in.
    """
    if not cubins:
        return []
    codes = [instructions_of(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        lines = output("nvdisasm", "-b", target.replace("sm_", "SM"), file.name).splitlines()
    instructions = [(int(found[1], 16), line) for line in lines if (found := _ADDRESS.search(line))]
    texts: list[str] = []
    at, end = 0, 0
    for code in codes:
        first, end = at, end + len(code)
        while at < len(instructions) and instructions[at][0] < end:
            at += 1
        texts.append(with_labels(instructions[first:at]))
    return texts


def instructions_of(cubin: bytes) -> bytes:
    """The code section of a cubin (an ELF file of 64 bits). Raises ValueError where it has not just one."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    count, names_at = struct.unpack_from("<HH", cubin, 0x3C)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + 64 * i) for i in range(count)]
    names = sections[names_at][4]
    found = [(start, size) for name, _, _, _, start, size in sections if cubin.startswith(b".text.", names + name)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} functions where one was expected")
    return cubin[found[0][0] : sum(found[0])]


def with_labels(instructions: Sequence[tuple[int, str]]) -> str:
    """The lines of instructions at addresses. Branches to addresses become branches to labels."""
    branches = [_BRANCH.search(line) for _, line in instructions]
    targets = {int(found[2], 16) for found in branches if found}
    text = []
    for (address, line), branch in zip(instructions, branches, strict=True):
        if address in targets:
            text.append(f".L_x_{address}:")
        if branch:
            line = f"{line[: branch.start(1)]}`(.L_x_{int(branch[2], 16)}){line[branch.end(1) :]}"
        text.append(line)
    return "\n".join(text)
