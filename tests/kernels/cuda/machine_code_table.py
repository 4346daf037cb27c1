"""Prints what machine code says of the kernels that a step's time goes to, as the table in BENCHMARKS.md.

    python tests/kernels/cuda/machine_code_table.py [--for TARGET ...]

It is what test_machine_code.py looks at. Run it outside the simulator.
"""

from __future__ import annotations

import argparse
from typing import Any

from compiled import BATCH, DECODE, HOT, IN_FLIGHT, PREFILL, TARGETS, compile_all
from test_machine_code import turns_of

_REGISTERS, _SHARED = 65536, 100 * 1024  # of a multiprocessor; of some more shared memory
_MOST_WARPS = {"sm_86": 48, "sm_89": 48, "sm_120a": 48}  # of a multiprocessor; of others 64
_WIDE_BLOCKS = (
    "gate_",
    "up_",
    "gemv_transposed_",
    "normed_",
    "activated_",
    "predicted_",
)  # of 256 threads; others have 128
HEADER = (
    "| kernel | for | registers | warps | loads in flight | bytes of weights an instruction | instructions |",
    "| --- | --- | ---: | ---: | ---: | ---: | --- |",
)


def resident_warps(used: dict[str, Any], target: str, threads: int) -> int:
    """Warps of a multiprocessor that registers and static shared memory leave room for."""
    of_block = threads // 32
    registers = -(-used["REG"] // 8) * 8 * threads
    blocks = min(_REGISTERS // registers, _SHARED // max(1, used["SHARED"]), _MOST_WARPS.get(target, 64) // of_block)
    return blocks * of_block


def row(name: str, target: str, used: dict[str, Any]) -> str:
    """A line of the table: of the loop that reads the most weights, or that multiplies the most."""
    key = "mma" if name in (*PREFILL, *BATCH) else "ffma" if name in DECODE else "weight_loads"
    loop = max(used["loops"], key=lambda one: one[key])
    flight = max(one["in_flight"] for one in used["loops"])
    bytes_each, each = "", ""
    if name in IN_FLIGHT:
        bytes_each = f"{512 * loop['weight_loads'] / loop['instructions']:.1f}"
    elif name in BATCH:
        turns, weights, _ = turns_of(name)
        flight, bytes_each = (turns - 1) * weights // 512, f"{turns * weights / loop['instructions']:.1f}"
    elif loop[key]:
        each = f"{loop['instructions'] / loop[key]:.1f} for each of {loop[key]} {'mma' if key == 'mma' else 'FFMA'}"
    threads = 256 if name.startswith(_WIDE_BLOCKS) else 128
    warps = resident_warps(used, target, threads)
    cells = (f"`{name}`", target, used["REG"], warps, flight if flight else "", bytes_each, each)
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--for", dest="targets", nargs="+", choices=TARGETS, default=["sm_86", "sm_90a"])
    asked = parser.parse_args()
    report = compile_all(dict.fromkeys(HOT, asked.targets))
    print(*HEADER, sep="\n")
    for name in HOT:
        for target, used in report.get(name, {}).items():
            print(row(name, target, used) if target != "error" else f"| `{name}` | {used} |")


if __name__ == "__main__":
    main()
