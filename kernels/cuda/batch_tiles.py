"""How the rows of a batch are cut into tiles that attend together: neighbours of one sequence."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def cut_tiles(sequences: NDArray[np.int32], most: int) -> NDArray[np.int32]:
    """(tiles, 2): first row and count of rows of one sequence, at most `most`; `sequences` (n,) has each row's."""
    starts = np.flatnonzero(np.diff(sequences, prepend=-1))
    tiles = [
        (first, min(most, end - first))
        for start, end in zip(starts, [*starts[1:], len(sequences)], strict=True)
        for first in range(start, end, most)
    ]
    return np.array(tiles, np.int32)
