"""Device memory of the emulated NPU: every access is checked against what is allocated now."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

ALIGNMENT = 64
UNDEFINED = 0xFF  # bytes of new memory: NaN in every float type


class BrokenRule(Exception):
    """The backend did what CANN does not allow."""


@dataclass
class Allocation:
    """A piece of device memory. It stays where it is when it is freed, so that no address is given out twice."""

    address: int
    data: NDArray[np.uint8]
    live: bool = True


@dataclass(frozen=True)
class View:
    """What an aclTensor describes."""

    address: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    offset: int  # in elements
    storage: int  # elements from the address on

    @property
    def extent(self) -> tuple[int, int]:
        """First and last element that it reaches, from the address on."""
        if 0 in self.shape:
            return self.offset, self.offset - 1
        return self.offset, self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))

    def overlaps(self, other: View) -> bool:
        """Whether the views reach the same bytes."""
        ranges = []
        for view in (self, other):
            first, last = view.extent
            ranges.append((view.address + first * view.dtype.itemsize, view.address + (last + 1) * view.dtype.itemsize))
        (a, b), (c, d) = ranges
        return max(a, c) < min(b, d)


class Memory:
    """All memory of a device."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._starts: list[int] = []
        self._allocations: list[Allocation] = []

    @property
    def used(self) -> int:
        """Bytes that are allocated now."""
        return sum(len(a.data) for a in self._allocations if a.live)

    def allocate(self, size: int) -> int:
        """New memory, or 0 where there is no room."""
        if size <= 0:
            raise BrokenRule(f"{size} bytes are asked for")
        if size > self.size - self.used:
            return 0
        raw = np.full(size + ALIGNMENT, UNDEFINED, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        allocation = Allocation(raw.ctypes.data + start, raw[start : start + size])
        at = bisect_right(self._starts, allocation.address)
        self._starts.insert(at, allocation.address)
        self._allocations.insert(at, allocation)
        return allocation.address

    def free(self, address: int) -> None:
        """Give memory back."""
        found = self._containing(address)
        if found is None or found.address != address:
            raise BrokenRule("what is freed was never allocated")
        if not found.live:
            raise BrokenRule("memory is freed twice")
        found.live = False

    def holds(self, address: int) -> bool:
        """Whether an address lies in device memory, freed or not."""
        return self._containing(address) is not None

    def find(self, address: int, size: int) -> NDArray[np.uint8]:
        """The bytes at an address. Raises BrokenRule unless all are allocated."""
        found = self._containing(address)
        if found is None:
            raise BrokenRule(f"{address:#x} is no address of device memory")
        if not found.live:
            raise BrokenRule("memory is used after it was freed")
        start = address - found.address
        if size < 0 or start + size > len(found.data):
            raise BrokenRule(f"{size} bytes from byte {start} of {len(found.data)}")
        return found.data[start : start + size]

    def allocation_of(self, address: int) -> NDArray[np.uint8]:
        """All bytes of the allocation that holds an address."""
        self.find(address, 0)
        found = self._containing(address)
        assert found is not None
        return found.data

    def array(self, view: View) -> NDArray[Any]:
        """A view as an array of its memory."""
        first, last = view.extent
        if view.address % 32:
            raise BrokenRule(f"the address {view.address:#x} of a tensor is not a multiple of 32")
        if first < 0 or last >= view.storage:
            raise BrokenRule(f"a view reaches element {last} of a storage of {view.storage}")
        data = self.find(view.address, view.storage * view.dtype.itemsize)
        flat = data.view(view.dtype)[view.offset :]
        return np.lib.stride_tricks.as_strided(flat, view.shape, _bytes(view.strides, view.dtype.itemsize))

    def _containing(self, address: int) -> Allocation | None:
        at = bisect_right(self._starts, address) - 1
        if at < 0:
            return None
        found = self._allocations[at]
        return found if address < found.address + len(found.data) else None


def _bytes(strides: Sequence[int], size: int) -> tuple[int, ...]:
    return tuple(s * size for s in strides)
