"""What can be read in a kernel's machine code without a GPU: its instructions, its loops and what these load."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass

from svdengine.errors import SvdEngineError

_WARP = 32  # lanes, which load side by side
_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+ )?([A-Z]\S*)(.*)")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")


@dataclass(frozen=True)
class Instruction:
    """An instruction of a warp."""

    address: int
    name: str  # with its modifiers: LDG.E.128.CONSTANT
    target: str  # the label that it goes to, or ""

    @property
    def loaded_bytes(self) -> int:
        """Bytes of global memory that a warp loads with it."""
        if not self.name.startswith("LDG"):
            return 0
        parts = self.name.split(".")
        for width, size in (("128", 16), ("64", 8), ("U8", 1), ("S8", 1), ("U16", 2), ("S16", 2)):
            if width in parts:
                return _WARP * size
        return _WARP * 4


def disassembled(cubin: bytes) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions of a cubin, and the address of each label. Raises SvdEngineError where nvdisasm is missing."""
    try:
        from cuda import pathfinder

        program = pathfinder.find_nvidia_binary_utility("nvdisasm")
    except ImportError:
        program = None
    if program is None:
        raise SvdEngineError('reading machine code needs nvdisasm: pip install "svdengine[test]"')
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([program, "-c", file.name], capture_output=True, text=True, check=True).stdout
    return parse(text)


def parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions in what nvdisasm printed, and the address of each label."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            waiting.append(label[1])
        elif found := _INSTRUCTION.match(line):
            address, target = int(found[1], 16), _TARGET.search(found[3])
            labels |= dict.fromkeys(waiting, address)
            waiting.clear()
            instructions.append(Instruction(address, found[2].rstrip(";"), target[1] if target else ""))
    return instructions, labels


def loops(instructions: list[Instruction], labels: dict[str, int]) -> list[list[Instruction]]:
    """The loops that have no other one inside: from where an instruction goes back to, up to that instruction.

    What goes back from code that was moved to the end looks like a loop around all between, and is left out too.
    """
    spans = [(labels.get(last.target, last.address), last.address) for last in instructions]
    spans = [(begin, end) for begin, end in spans if begin < end]
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [[one for one in instructions if begin <= one.address <= end] for begin, end in inner]


def bytes_per_instruction(code: tuple[list[Instruction], dict[str, int]]) -> float:
    """Bytes that a warp loads an instruction, in the loop that loads most of them; 0 where no loop loads any."""
    rates = [(sum(one.loaded_bytes for one in loop), len(loop)) for loop in loops(*code)]
    inner = [(loaded, size) for loaded, size in rates if loaded]
    if not inner:
        return 0.0
    most = max(loaded for loaded, _ in inner)
    loaded, size = min(((loaded, size) for loaded, size in inner if loaded == most), key=lambda pair: pair[1])
    return loaded / size
