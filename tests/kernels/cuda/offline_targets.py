"""Compiles kernels for every target (kernels/cuda/compilation.py), and prints what each uses as one line of JSON.

python offline_targets.py NAME ...   # all kernels, where none is named; not in the simulator
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections import Counter

from offline import _output, inspect_cubin

from svdengine.kernels.cuda.catalogue import all_kernels
from svdengine.kernels.cuda.compilation import TARGETS, compile_kernel


def operations(cubin: bytes) -> dict[str, int]:
    """How often each operation of the machine code occurs in it, without modifiers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _output("nvdisasm", "-c", file.name)
    return dict(Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z]\w*)", text, re.MULTILINE)))


def main(names: list[str]) -> None:
    """Print {kernel: {architecture: {"operations": {...}, figures of `inspect_cubin`}}}."""
    report = {}
    for name, kernel in all_kernels().items():
        if not names or name in names:
            _, cubins = compile_kernel(kernel, list(TARGETS.values()))
            report[name] = {
                target: {**inspect_cubin(cubin), "operations": operations(cubin)}
                for target, cubin in zip(TARGETS, cubins, strict=True)
            }
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1:])
