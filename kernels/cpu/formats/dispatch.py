"""The kernels of whichever format a matrix has: what `FormatKernels` lists, by the code in the matrix.

A new format is a line in `ALL`. A code that is none of theirs raises ValueError before a step runs (`check_codes` of
matrix.py): another format's kernels would read memory that is not there. Should one come this far, nothing is read, and
a product is NaN. (Exceptions in kernels that are called for every row would make all of them take a sixth longer to
compile.)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from svdengine.kernels.cpu.formats.floats import BF16_KERNELS, F16_KERNELS, F32_KERNELS
from svdengine.kernels.cpu.formats.kernels import FormatKernels
from svdengine.kernels.cpu.formats.q4 import Q4_KERNELS
from svdengine.kernels.cpu.formats.q6 import Q6_KERNELS
from svdengine.kernels.cpu.formats.q8 import Q8_KERNELS
from svdengine.kernels.cpu.formats.ternary import TERNARY_KERNELS
from svdengine.kernels.cpu.jit import inlined, jit
from svdengine.kernels.cpu.matrix import FORMAT
from svdengine.kernels.cpu.simd import zero_f32
from svdengine.kernels.formats import FORMATS

ALL: tuple[FormatKernels, ...] = (
    *(Q8_KERNELS, Q6_KERNELS, Q4_KERNELS, TERNARY_KERNELS),
    *(F32_KERNELS, F16_KERNELS, BF16_KERNELS),
)


def _by_format(operation: str, parameters: str, otherwise: str = "", compiled: Any = jit) -> Any:
    """A compiled function that runs `operation` of the matrix's format, or the one of its sums in integers.

    It is a chain of comparisons, written out because compiled code cannot choose a function from a table.
    """
    lines = [f"def {operation}(matrix, {parameters}):", "    code = matrix[FORMAT]"]
    scope: dict[str, Any] = {"FORMAT": FORMAT, "nan": np.float32(np.nan), "zero_f32": zero_f32}
    for kernels in ALL:
        function = getattr(kernels, operation, None) or getattr(kernels.sums, operation, None)
        if function is not None:
            scope[kernels.name] = function
            lines.append(f"    if code == {FORMATS[kernels.name].code}:")
            lines.append(f"        return {kernels.name}(matrix, {parameters})")
    exec("\n".join([*lines, f"    return {otherwise}"]), scope)
    return compiled(scope[operation])


# Once for each row of a product: in place of the call.
dot_row = _by_format("dot_row", "row, x, quantized, ahead", "nan", inlined)
# Once for several rows or many columns, or seldom. A copy at each place would be a minute of compiling, and no faster.
dot_four = _by_format("dot_four", "r0, r1, r2, r3, n0, n1, n2, n3, x, quantized, out")
dot_one_row = _by_format("dot_row", "row, x, quantized, ahead", "nan")
add_four = _by_format("add_four", "r0, r1, r2, r3, h0, h1, h2, h3, out, first, last")
scale_four = _by_format("scale_four", "rows, weights, planes, stride, side, first, last")
add_many = _by_format("add_many", "rows, ahead, planes, stride, sums, fours, blocks")
finish = _by_format("finish", "out, sums, side, unit, blocks")
load_weights = _by_format("load_weights", "row, column", "zero_f32()")
pack_panel = _by_format("pack_panel", "first, start, stop, panel, staging")
pack_columns = _by_format("pack_columns", "first, start, stop, panel")
