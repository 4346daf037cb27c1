"""Which FFN block a pair has, in a mixture of experts: a pair is a row of the step and one of the blocks that it has.

Pairs are numbered row by row: pair p is of row p // per_row. A list on the device, made by the router
(kernels/cuda/router.py), says which of its layer's blocks each pair has, so that no launch depends on what was chosen.
The matrices of a layer's blocks lie one below the other. Kernels for mixtures are compiled apart: others know nothing
of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from svdengine.kernels.cuda.intrinsics import jit

# The parameters of a kernel that say so: the block of each pair, what its output is multiplied by, and pairs of a row.
CHOSEN = "int32* chosen, float32* weights, int32 per_row"
_NONE, _ONE = np.int32(0), np.float32(1)


@jit(device=True)
def row_of(pair, per_row):
    """The row that a pair is of: a division of 32 bits, which is the cheaper one."""
    return np.int32(np.uint32(pair) // np.uint32(per_row))


@jit(device=True)
def _of_row(chosen, weights, per_row, pair):
    return pair, _NONE, _ONE


@jit(device=True)
def _of_pair(chosen, weights, per_row, pair):
    return row_of(pair, per_row), chosen[pair], weights[pair]


# By whether the model is a mixture: owner(chosen, weights, per_row, pair), the pair's row, block, and weight. Of other
# models a pair is a row, which has the layer's only block.
OWNER: dict[bool, Any] = {False: _of_row, True: _of_pair}


def suffix(split: bool, experts: bool) -> str:
    """Of a kernel's name: whether its layer is split (kernels/cuda/memory_split.py), or of a mixture of experts."""
    return "_experts" if experts else "_split" if split else ""


# Where several rows are multiplied by the blocks that they have, pairs are sorted by block (pair_groups.py), and those
# of a block cut into tiles. Of each tile there is a list of GROUP int32: its block, its first pair, and the
# one behind its last. The parameters of a kernel that are such a list, and for how many tiles it has room:
GROUPS = "int32* groups, int32 slots"
GROUP = 3


@jit(device=True)
def _tile_of_rows(groups, slots, n, width, place):
    shares = np.uint32((n + width - 1) // width)
    return np.int32(place // shares), _NONE, np.int32(place % shares * width), n


@jit(device=True)
def _tile_of_pairs(groups, slots, n, width, place):
    shares = np.uint32(slots)
    at = np.int32(place % shares * GROUP)
    return np.int32(place // shares), groups[at], groups[at + 1], groups[at + 2]


# By whether the model is a mixture: tile_of(groups, slots, n, width, place). Of block `place` of a grid, in which all
# tiles that read the same weights are neighbours: which weights it has, the FFN block that these are of, its first
# row of activations, and the row behind its last. A tile that is not in use has none.
TILE_OF: dict[bool, Any] = {False: _tile_of_rows, True: _tile_of_pairs}
