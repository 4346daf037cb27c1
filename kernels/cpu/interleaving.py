"""The values of a matrix's rows, copied side by side: panels of 16 rows (panels.py)."""

from __future__ import annotations

from svdengine.kernels.cpu.formats.q8 import copy_biased
from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.matrix import PANEL_ROWS
from svdengine.kernels.cpu.pieces import piece
from svdengine.kernels.cpu.simd import load_int, store_int
from svdengine.kernels.cpu.tile import pack_words, place_of


@jit
def interleave_panel(source, rows, row_bytes, to, biased):
    """The words of up to 16 rows at `source`, side by side; those of rows that are not there are left as they are."""
    words = row_bytes // 4
    fast = words // 16 * 16 if rows == PANEL_ROWS else 0
    for word in range(0, fast, 16):
        pack_words(source + 4 * word, row_bytes, to + 64 * word)
    for word in range(fast, words):
        for lane in range(rows):
            store_int(to + place_of(word, lane), load_int(source + lane * row_bytes + 4 * word))
    if biased:
        for word in range(words):
            copy_biased(to + 64 * word, to + 64 * word)


@piece
def interleave(source, rows, row_bytes, to, biased):
    """Interleave the values of all rows of a matrix: addresses of its first row and of its first panel."""
    for row in range(0, rows, PANEL_ROWS):
        interleave_panel(source + row * row_bytes, min(PANEL_ROWS, rows - row), row_bytes, to + row * row_bytes, biased)
