"""What a weight format has to bring for products on tensor cores: how a warp takes 16 rows of 64 columns as operands.

Such a tile lies in shared memory, row after row. The 16-byte pieces of a row change places with each other
(`piece_place`), so that those of neighbouring rows are in different banks. It is multiplied by 8 rows of activations,
rounded to 16 bits (kernels/cuda/rounding.py), in two steps of a group of 32 columns each. Of a group and an activation
row a lane has the words

    b0, b1   word l % 4 of the high bytes of the first 16 columns, and of the last 16
    b2, b3   the same of the low bytes

A weight is step * level - least, with a level that the operands hold, and a step and a least of its group.

Where columns are outputs, a tile is 16 neurons. Transposed, a word of it has two columns of two neurons: bytes 0 and 2
are column 2 * (l // 4) of neurons 2 * (l % 4) and the one behind it, bytes 1 and 3 the next column. Of such words, `u`,
each group has four: 16 columns of the first 8 neurons, of the last 8, and the same of the next 16 columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from svdengine.kernels.cuda.intrinsics import jit, lane_index
from svdengine.kernels.cuda.tensor_cores import load_matrices

TILE_ROWS = 16
TILE_COLUMNS = 64  # two groups, whose levels lie in the same bytes in some formats
_NONE = np.int32(0)


@dataclass(frozen=True)
class TileKernels:
    """Device functions for tiles; a is a local array of uint32 in which a tile has items from `first` on."""

    row_tiles: int  # one below the other that a warp has: the more, the fewer times activations are read
    items: int  # of `a` that a tile has
    load: Any  # (shared, at, a, first): the tile at word `at` of shared memory as operands
    product: Any  # (a, first, group, b) -> 4 float32, C of a product (tensor_cores.py): levels times activations
    scaled: bool = True  # whether groups have steps
    shifted: bool = False  # whether they have leasts
    units: Any = None  # (row, r) -> two float32 of row r, which `scales` takes
    scales: Any = None  # (scale, low, units, at) -> step and least of group `at` of the matrix, then of the next one
    unit: float = 1.0  # by which products are too small
    levels: Any = None  # (shared, at, u): 16 neurons' 64 columns at word `at`, as four bytes of levels a word; see `u`
    as_numbers: Any = None  # such a word as two words of two bfloat16 (byte_pairs.py)
    second_unit: float = 1.0  # by which the step of the second group is too small for `levels`
    padding: int = 0  # words behind a row of a tile, where pieces do not change places


def piece_place(pieces: int) -> Any:
    """place(r, p): where piece p of row r lies in its row, of a tile whose rows have `pieces` of 16 bytes.

    Eight rows' pieces with one number are then in eight different places of 128 bytes. Of an odd number they are so as
    they come. From eight on a format has padding.
    """
    shift = {2: 2, 4: 1}.get(pieces, 0)  # of a row's number to that of its 128 bytes

    @jit(device=True, forceinline=True)
    def place(r, p):
        if pieces == 2 or pieces == 4:
            return p ^ (r >> shift & (pieces - 1))
        return p

    return place


def load_of(pieces: int, load_matrices: Any = load_matrices) -> Any:
    """load(shared, at, piece): pieces `piece` and `piece + 1` of the 16 rows of a tile, as A of a product.

    load_matrices: of tensor_cores.py, as they lie or transposed.
    """
    words, place = 4 * pieces, piece_place(pieces)

    @jit(device=True, forceinline=True)
    def load(shared, at, piece):
        lane = lane_index()
        r = lane & 15
        return load_matrices(shared, at + r * words + 4 * place(r, piece + (lane >> 4)))

    return load


def load_piece_of(pieces: int, load_matrices: Any = load_matrices) -> Any:
    """load(shared, at, piece): only piece `piece` of them: the first two words of A."""
    words, place = 4 * pieces, piece_place(pieces)

    @jit(device=True, forceinline=True)
    def load(shared, at, piece):
        r = lane_index() & 15
        return load_matrices(shared, at + r * words + 4 * place(r, piece))

    return load


def integer_product(high: Any, low: Any) -> Any:
    """`product` of levels of 8 bits; high, low: the product of tensor cores with int8, and with uint8."""

    @jit(device=True, forceinline=True)
    def product(a, first, group, b):
        i = first + 4 * group
        h = high(a[i], a[i + 1], a[i + 2], a[i + 3], b[0], b[1], _NONE, _NONE, _NONE, _NONE)
        c = low(
            a[i], a[i + 1], a[i + 2], a[i + 3], b[2], b[3],
            np.int32(h[0] << 8), np.int32(h[1] << 8), np.int32(h[2] << 8), np.int32(h[3] << 8),
        )  # fmt: skip
        return np.float32(c[0]), np.float32(c[1]), np.float32(c[2]), np.float32(c[3])

    return product
