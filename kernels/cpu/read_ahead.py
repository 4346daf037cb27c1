"""Asking the system for rows of a mapped file before they are read, when the file is larger than memory.

A page that is touched first and read then costs a thread the whole time that storage takes for it. Asked for before,
all of a list's pages are on their way at once.
"""

from __future__ import annotations

import mmap

from llvmlite import ir
from numba.core import types

from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.matrix import DATA, MIN, MIN_BYTES, ROW, ROW_BYTES, ROW_PART_BYTES, ROWS, SCALE, SCALE_BYTES
from svdengine.kernels.cpu.simd import I8, I32, address, call, load_int, operation

_PAGE = mmap.PAGESIZE
_WILLNEED = getattr(mmap, "MADV_WILLNEED", None)


@operation(types.void, address, types.int64)
def will_need(builder, at, size):
    """Have pages read into memory, without waiting for them; `at` is where one begins. A hint."""
    if _WILLNEED is not None:
        pointer = builder.inttoptr(at, I8.as_pointer())
        call(builder, "madvise", I32, [pointer, size, ir.Constant(I32, _WILLNEED)])


@jit
def ask_for_matrix(matrix):
    """Ask for all parts of a matrix."""
    ask_for(matrix[DATA], matrix[ROWS] * matrix[ROW_BYTES])
    ask_for_scales(matrix)


@jit
def ask_for_scales(matrix):
    """Ask for all parts of a matrix but its rows: a page has those of so many rows that few pages are not needed."""
    ask_for(matrix[SCALE], matrix[SCALE_BYTES])
    ask_for(matrix[MIN], matrix[MIN_BYTES])
    ask_for(matrix[ROW], matrix[ROW_PART_BYTES])


@jit
def ask_for(at, size):
    """Ask for `size` bytes."""
    if size > 0:
        start = at // _PAGE * _PAGE
        will_need(start, at + size - start)


@jit
def ask_for_rows(matrix, neurons, count, gap):
    """Ask for the rows of `count` neurons listed in ascending order.

    Rows up to `gap` neurons apart are asked for together, and those between them are read too.
    """
    size = matrix[ROW_BYTES]
    k = 0
    while k < count:
        first = load_int(neurons + 4 * k)
        last = first
        k += 1
        while k < count and load_int(neurons + 4 * k) - last <= gap:
            last = load_int(neurons + 4 * k)
            k += 1
        start = (matrix[DATA] + first * size) // _PAGE * _PAGE
        will_need(start, matrix[DATA] + (last + 1) * size - start)
