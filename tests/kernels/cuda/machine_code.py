"""Reads machine code as nvdisasm prints it: its loops, what they load, and how much they do a multiply-add.

An order of instructions is what the GPU issues: a warp goes on after a load until an instruction reads what was loaded.
So loads between which nothing reads are on their way together.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_LABEL = re.compile(r"^\s*(\.L_[\w.]+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_TARGET = re.compile(r"`\((\.L_[\w.]+)\)")
_REGISTER = re.compile(r"\bR(\d+)\b")
_NO_RESULT = ("ST", "RED", "BRA", "EXIT", "BAR", "MEMBAR", "LDGSTS", "LDGDEPBAR", "DEPBAR", "WARPSYNC")
_GLOBAL = ("LD", "LDG", "ST", "STG", "ATOM", "ATOMG", "RED", "REDG", "LDGSTS", "CCTL", "BRA", "CALL")
_WIDTHS = {"128": 4, "64": 2}
WEIGHT_LOAD = re.compile(
    r"LDG\.E(?=.*\b(?:NA|EF)\b)(?=.*\b128\b)"
)  # passes the first cache: see intrinsics.ldg128_once


@dataclass(frozen=True)
class Instruction:
    """One machine instruction."""

    name: str  # with its modifiers: LDG.E.128.CONSTANT
    operands: str

    @property
    def kind(self) -> str:
        """The name without modifiers."""
        return self.name.split(".")[0]

    @property
    def written(self) -> frozenset[int]:
        """Registers that it leaves a result in; of loads all of them, of others the first."""
        if self.kind.startswith(_NO_RESULT):
            return frozenset()
        first = re.match(r"R(\d+)\b", self.operands)
        if first is None:
            return frozenset()
        count = next(
            (n for width, n in _WIDTHS.items() if self.kind.startswith("LD") and width in self.name.split(".")), 1
        )
        return frozenset(range(int(first[1]), int(first[1]) + count))

    @property
    def read(self) -> frozenset[int]:
        """Registers that its operands name, but for the result."""
        operands = self.operands.split(",", 1)
        text = self.operands if not self.written else (operands[1] if len(operands) > 1 else "")
        return frozenset(map(int, _REGISTER.findall(text)))


@dataclass(frozen=True)
class Loop:
    """The instructions of a loop that has no other one inside."""

    instructions: tuple[Instruction, ...]

    def count(self, *kinds: str) -> int:
        """Instructions of some kinds."""
        return sum(instruction.kind in kinds for instruction in self.instructions)

    @property
    def weight_loads(self) -> int:
        """Loads of 16 bytes of weights."""
        return sum(WEIGHT_LOAD.match(i.name) is not None for i in self.instructions)


def parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """All instructions, and for each label how many come before it."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.search(line):
            instructions.append(Instruction(found[1], found[2]))
    return instructions, labels


def inner_loops(text: str) -> list[Loop]:
    """The innermost loops, in order. A branch to itself, which ends every function, is none."""
    instructions, labels = parse(text)
    spans = []
    for at, instruction in enumerate(instructions):
        target = _TARGET.search(instruction.operands) if instruction.kind == "BRA" else None
        if target and labels.get(target[1], at + 1) < at:
            spans.append((labels[target[1]], at))
    inner = [s for s in spans if not any(s != o and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [Loop(tuple(instructions[first : last + 1])) for first, last in inner]


def memory_before_wait(text: str) -> int:
    """Instructions that use global memory before the kernel waits for the one before it; -1 where it never waits."""
    kinds = [instruction.kind for instruction in parse(text)[0]]
    if "ACQBULK" not in kinds:
        return -1
    return sum(kind in _GLOBAL for kind in kinds[: kinds.index("ACQBULK")])


def loads_in_flight(loop: Loop) -> int:
    """The most loads of weights that are on their way at once: issued, and not yet read from.

    The loop is gone through twice, so that a load that the next turn reads counts.
    """
    waiting: list[frozenset[int]] = []
    most = 0
    for instruction in loop.instructions * 2:
        waiting = [registers for registers in waiting if not registers & instruction.read]
        if WEIGHT_LOAD.match(instruction.name):
            waiting.append(instruction.written)
            most = max(most, len(waiting))
    return most


def summary(loop: Loop) -> dict[str, int]:
    """What tests ask of a loop."""
    return {
        "instructions": len(loop.instructions),
        "weight_loads": loop.weight_loads,
        "in_flight": loads_in_flight(loop),
        "ffma": loop.count("FFMA", "FFMA2"),
        "mma": loop.count("HMMA", "IMMA"),
        "copies": loop.count("LDGSTS"),
        "dp4a": loop.count("IDP"),
    }
