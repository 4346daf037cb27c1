"""Matrices that are read whole, interleaved: panels of 16 rows whose values lie side by side, four columns of each.

Sixteen rows are multiplied at once, a lane each: no sum runs across lanes, the scales of the rows are one vector, and a
weight is loaded once for several activation rows. Rows that may be skipped cannot lie so.

A panel's values are those of its rows as the format stores them, with the 4-byte words of the rows interleaved: first
the first word of each row, then the second ones; for Arm's smmla in pairs (tile.py). q8 is stored as its integer dot
product wants it, offset by BIAS (dot.py). Scales and minima are interleaved by group, and a row's units likewise. Rows
that fill up the last panel have no scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from svdengine.kernels.cpu.aligned import large
from svdengine.kernels.cpu.isa import active_isa, weight_bias
from svdengine.kernels.cpu.library import loaded
from svdengine.kernels.cpu.matrix import PANEL_ROWS
from svdengine.kernels.cpu.parts import INTERLEAVE
from svdengine.kernels.formats import Parts, WeightFormat


def interleaved(parts: Mapping[str, NDArray], weight_format: WeightFormat, threads: int = 1) -> Parts:
    """The stored parts of a stack of matrices, (layers, rows, ...), as panels: (layers, panels, ...), aligned.

    The format is one of PANEL_CODES (matrix.py).
    """
    values = parts[""]
    layers, rows, row_bytes = len(values), values.shape[1], values[0, 0].nbytes
    panels = -(-rows // PANEL_ROWS)
    out: Parts = {"": large(layers * panels * PANEL_ROWS * row_bytes)}
    source, to = values.ctypes.data, out[""].ctypes.data
    biased = weight_bias(active_isa()) != 0 and weight_format == "q8"

    interleave = loaded(frozenset({INTERLEAVE})).function("interleave", 5)

    def one(part: tuple[int, int, int]) -> None:
        row, panel, count = part
        interleave(source + row * row_bytes, count, row_bytes, to + panel * PANEL_ROWS * row_bytes, biased)

    if rows % PANEL_ROWS == 0:  # a stack is like one matrix, which the threads share
        bounds = [layers * panels * i // threads for i in range(threads + 1)]
        shares = [(a * PANEL_ROWS, a, (b - a) * PANEL_ROWS) for a, b in pairwise(bounds)]
    else:
        shares = [(layer * rows, layer * panels, rows) for layer in range(layers)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, shares))
    for suffix, part in parts.items():
        if suffix:
            out[suffix] = _side_by_side(part, panels)
    return out


def _side_by_side(part: NDArray, panels: int) -> NDArray:
    """(layers, rows, width) as (layers, panels, width, 16)."""
    layers, rows, width = part.shape
    filled = part
    if rows % PANEL_ROWS:
        filled = np.zeros((layers, panels * PANEL_ROWS, width), part.dtype)
        filled[:, :rows] = part
    return np.ascontiguousarray(filled.reshape(layers, panels, PANEL_ROWS, width).transpose(0, 1, 3, 2))
