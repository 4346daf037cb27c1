"""Views of device memory, as operators take them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

ALIGNMENT = 32  # bytes: the address of a storage is a multiple of it, a view's first element need not be
ACL_TYPES = {"float32": 0, "float16": 1, "int8": 2, "int32": 3, "uint8": 4, "int64": 9, "bool": 12}


@dataclass(frozen=True)
class Tensor:
    """Some elements of a storage. Strides and the offset are in elements; nothing is owned."""

    address: int  # of the storage
    dtype: str  # NumPy's name, one of ACL_TYPES
    storage: int  # elements that there are from the address on
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @property
    def item_bytes(self) -> int:
        """Bytes of an element."""
        return np.dtype(self.dtype).itemsize

    @property
    def size(self) -> int:
        """Elements of the view."""
        return math.prod(self.shape)

    @property
    def pointer(self) -> int:
        """The address of the first element."""
        return self.address + self.offset * self.item_bytes

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie one after the other, in order."""
        return self.strides == row_strides(self.shape)

    def reshape(self, *shape: int) -> Tensor:
        """The same elements in another shape. Raises ValueError for another number of them, or gaps between them."""
        if math.prod(shape) != self.size or not self.contiguous:
            raise ValueError(f"a view of shape {self.shape} and strides {self.strides} is not one of shape {shape}")
        return replace(self, shape=shape, strides=row_strides(shape))

    def rows(self, first: int, count: int) -> Tensor:
        """`count` of the first axis, from `first`."""
        if not 0 <= first <= first + count <= self.shape[0]:
            raise ValueError(f"rows {first} to {first + count} of {self.shape[0]}")
        return replace(self, shape=(count, *self.shape[1:]), offset=self.offset + first * self.strides[0])

    def leading(self, size: int) -> Tensor:
        """The first `size` elements of a flat view."""
        return self.rows(0, size)

    def columns(self, count: int) -> Tensor:
        """The first columns of a matrix: its rows lie apart then."""
        return replace(self, shape=(self.shape[0], count))

    def permuted(self, dimensions: tuple[int, ...]) -> Tensor:
        """The same elements with the dimensions in another order; nothing moves."""
        shape, strides = (tuple(values[i] for i in dimensions) for values in (self.shape, self.strides))
        return replace(self, shape=shape, strides=strides)

    @property
    def transposed(self) -> Tensor:
        """A matrix seen the other way; nothing moves, and products recognise it."""
        return replace(self, shape=self.shape[::-1], strides=self.strides[::-1])


def row_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a view without gaps."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def whole(address: int, shape: tuple[int, ...], dtype: Any) -> Tensor:
    """All of a storage."""
    return Tensor(address, np.dtype(dtype).name, math.prod(shape), shape, row_strides(shape))
