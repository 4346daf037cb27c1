"""Views of device memory are those of NumPy, and chunks of a step's rows are such that every row is attended once."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from svdengine.kernels.ascend.attention import alone_first, chunk_rows
from svdengine.kernels.ascend.tensor import Tensor, whole
from svdengine.kernels.ascend.workspace import mask_piece

SHAPES = st.lists(st.integers(1, 5), min_size=2, max_size=4).map(tuple)


def read(view: Tensor, storage: NDArray) -> NDArray:
    """The elements that a view stands for."""
    flat = storage.reshape(-1)[view.offset :]
    return np.lib.stride_tricks.as_strided(flat, view.shape, tuple(s * storage.itemsize for s in view.strides))


@given(SHAPES, st.data())
def test_views_are_those_of_numpy(shape: tuple[int, ...], data: st.DataObject) -> None:
    storage = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    view = whole(64, shape, np.float32)
    np.testing.assert_array_equal(read(view, storage), storage)
    first = data.draw(st.integers(0, shape[0] - 1))
    count = data.draw(st.integers(1, shape[0] - first))
    rows, expected = view.rows(first, count), storage[first : first + count]
    np.testing.assert_array_equal(read(rows, storage), expected)
    assert rows.pointer == 64 + 4 * first * math.prod(shape[1:]) and rows.contiguous
    order = data.draw(st.permutations(range(len(shape))))
    np.testing.assert_array_equal(read(rows.permuted(tuple(order)), storage), expected.transpose(order))
    flat = rows.reshape(rows.size)
    np.testing.assert_array_equal(read(flat, storage), expected.reshape(-1))
    np.testing.assert_array_equal(read(flat.leading(1), storage), expected.reshape(-1)[:1])
    matrix = rows.reshape(count, rows.size // count)
    np.testing.assert_array_equal(read(matrix.transposed, storage), expected.reshape(count, -1).T)
    narrow = matrix.columns(1)
    np.testing.assert_array_equal(read(narrow, storage), expected.reshape(count, -1)[:, :1])
    if count > 1 and matrix.shape[1] > 1:
        assert not narrow.contiguous
        with pytest.raises(ValueError, match="is not one of shape"):
            narrow.reshape(count)


def test_views_stay_inside() -> None:
    view = whole(64, (3, 4), np.int8)
    with pytest.raises(ValueError, match="rows 2 to 4 of 3"):
        view.rows(2, 2)
    with pytest.raises(ValueError, match="is not one of shape"):
        view.reshape(13)


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 40)), min_size=1, max_size=8), st.integers(0, 50))
def test_every_row_is_attended_once(chunks: list[tuple[int, int]], window: int) -> None:
    sequences = np.repeat(np.arange(len(chunks), dtype=np.int32), [rows for rows, _ in chunks])
    positions = np.concatenate([np.arange(start, start + rows, dtype=np.int32) for rows, start in chunks])
    order = alone_first(sequences)
    assert sorted(order) == list(range(len(sequences)))
    sequences, positions = sequences[order], positions[order]
    items = 2 * len(sequences) * (48 + 16)
    attending = chunk_rows(sequences, positions, items)

    # Chunks are the rows in order, each of one sequence; rows alone in theirs come first.
    assert [c.first for c in attending.chunks] == np.cumsum([0, *(c.rows for c in attending.chunks[:-1])]).tolist()
    assert sum(c.rows for c in attending.chunks) == len(sequences)
    for chunk in attending.chunks:
        mine = slice(chunk.first, chunk.first + chunk.rows)
        assert len(set(sequences[mine])) == 1 and chunk.length == positions[mine].max() + 1
    assert attending.alone == sum(rows == 1 for rows, _ in chunks)
    assert list(attending.lengths) == (positions[: attending.alone] + 1).tolist()

    # Masks do not overlap, begin aligned, and fit in their half.
    pieces = sorted((c.mask, c.mask + mask_piece(c.rows, c.length)) for c in attending.chunks)
    assert pieces[0][0] == 0 and pieces[-1][1] <= items - attending.windowed_masks == items // 2
    assert all(end == start and start % 16 == 0 for (_, end), (start, _) in pairwise(pieces))

    # The fused operator takes the rows alone, unless a window hides something of one of them.
    hidden = window and any(length > window for length in attending.lengths)
    assert attending.fused(window, True) == (0 if hidden else attending.alone) and attending.fused(window, False) == 0
