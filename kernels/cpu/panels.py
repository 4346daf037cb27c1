"""Matrices that are read whole, interleaved: panels of 16 rows whose values lie side by side, four columns of each.

Sixteen rows are multiplied at once, a lane each: no sum runs across lanes, the scales of the rows are one vector, and a
weight is loaded once for several activation rows. Rows that may be skipped cannot lie so.

A panel's values are those of its rows as the format stores them, with the 4-byte words of the rows interleaved: first
the first word of each row, then the second ones. q8 is stored as its integer dot product wants it, offset by BIAS
(dot.py). Scales and minima are interleaved by group, and a row's units likewise. Rows that fill up the last panel have
no scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from svdengine.kernels.cpu.aligned import large
from svdengine.kernels.cpu.dot import BIAS
from svdengine.kernels.cpu.formats.q8 import copy_biased
from svdengine.kernels.cpu.jit import entry, jit
from svdengine.kernels.cpu.matrix import PANEL_ROWS
from svdengine.kernels.cpu.simd import load_int, store_int
from svdengine.kernels.cpu.tile import transpose_words
from svdengine.kernels.formats import Parts, WeightFormat


@jit
def interleave_panel(source, rows, row_bytes, to, biased):
    """The words of up to 16 rows at `source`, side by side; those of rows that are not there are left as they are."""
    words = row_bytes // 4
    fast = words // 16 * 16 if rows == PANEL_ROWS else 0
    for word in range(0, fast, 16):
        transpose_words(source + 4 * word, row_bytes, to + 64 * word)
    for word in range(fast, words):
        for lane in range(rows):
            store_int(to + 64 * word + 4 * lane, load_int(source + lane * row_bytes + 4 * word))
    if biased:
        for word in range(words):
            copy_biased(to + 64 * word, to + 64 * word)


@entry
def interleave(source: int, rows: int, row_bytes: int, to: int, biased: bool) -> None:
    """Interleave the values of all rows of a matrix: addresses of its first row and of its first panel."""
    for row in range(0, rows, PANEL_ROWS):
        interleave_panel(source + row * row_bytes, min(PANEL_ROWS, rows - row), row_bytes, to + row * row_bytes, biased)


def interleaved(parts: Mapping[str, NDArray], weight_format: WeightFormat, threads: int = 1) -> Parts:
    """The stored parts of a stack of matrices, (layers, rows, ...), as panels: (layers, panels, ...), aligned.

    The format is one of PANEL_CODES (matrix.py).
    """
    values = parts[""]
    layers, rows, row_bytes = len(values), values.shape[1], values[0, 0].nbytes
    panels = -(-rows // PANEL_ROWS)
    out: Parts = {"": large(layers * panels * PANEL_ROWS * row_bytes)}
    source, to = values.ctypes.data, out[""].ctypes.data
    biased = bool(BIAS) and weight_format == "q8"

    def one(layer: int) -> None:
        at = to + layer * panels * PANEL_ROWS * row_bytes
        interleave(source + layer * rows * row_bytes, rows, row_bytes, at, biased)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, range(layers)))
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
