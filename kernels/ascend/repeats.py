"""Which operators give the right results when a plan of theirs runs again: found out by running them.

A plan's results are compared with those of the same call planned anew, at a run whose results are not those of its
first one: a plan that forgets to read its inputs would be right by chance otherwise. Until then both are run, and what
the new one wrote stays. An operator that was wrong once is not repeated any more, with any arguments.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svdengine.kernels.ascend.signatures import OPERATORS, OUTPUTS
from svdengine.kernels.ascend.tensor import Tensor

Results = list[NDArray[Any]]
_CLOSE = 2.0**-6  # of the largest result: sums may be added up in another order from run to run


class Repeats:
    """What was found out about operators on one device. `read` and `write` copy a view's elements, and wait."""

    def __init__(
        self, read: Callable[[Tensor], NDArray[Any]], write: Callable[[Tensor, NDArray[Any]], None], version: str
    ) -> None:
        self._read, self._write, self._version = read, write, version
        self._refused: set[str] = set()

    def allowed(self, name: str) -> bool:
        """Whether plans of an operator may be kept."""
        return name not in self._refused

    def first(
        self, name: str, arguments: Sequence[Any], repeat: Callable[[], object], once: Callable[[], object]
    ) -> Callable[[], object]:
        """Start a new plan by `repeat`, and return what starts the same call from then on. `once` plans it anew."""
        repeat()
        touched, proven = self._written(name, arguments), False
        before = [self._read(tensor) for tensor in touched]

        def again() -> None:
            nonlocal proven
            if name in self._refused:
                once()
            elif proven:
                repeat()
            else:
                proven = self._compare(name, arguments, touched, before, repeat, once)

        return again

    def _compare(
        self,
        name: str,
        arguments: Sequence[Any],
        touched: list[Tensor],
        before: Results,
        repeat: Callable[[], object],
        once: Callable[[], object],
    ) -> bool:
        """Run both ways, and say whether the plan has proven right; what `once` wrote stays.

        touched: what the plan wrote first, with the results `before`: rows of a cache that it may write again by
        mistake.
        """
        written = self._written(name, arguments)
        overwritten = {tensor: self._read(tensor) for tensor in [*touched, *written]}
        repeat()
        repeated = [self._read(tensor) for tensor in written]
        for tensor, values in overwritten.items():
            self._write(tensor, values)
        once()
        expected = [self._read(tensor) for tensor in written]
        if not _alike(repeated, expected):
            self._refused.add(name)
            print(
                f"CANN {self._version}: {name} gives other results when its plan runs again; it is planned anew each"
                " time, which takes longer",
                file=sys.stderr,
            )
            return False
        return not _alike(before, expected)

    def _written(self, name: str, arguments: Sequence[Any]) -> list[Tensor]:
        """The views that an operator writes."""
        if name == "aclnnInplaceIndexCopy":  # a few rows of what may be all keys of a cache
            return [arguments[0].rows(int(row), 1) for row in self._read(arguments[2])]
        kinds = OPERATORS[name].split()
        tensors = [value for kind, value in zip(kinds, arguments, strict=True) if kind == "tensor"]
        written = tensors[:1] if name.startswith("aclnnInplace") else tensors[-OUTPUTS.get(name, 1) :]
        return [tensor for tensor in written if tensor is not None]


def _alike(found: Results, expected: Results) -> bool:
    return all(_is_close(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(found, expected, strict=True))


def _is_close(found: NDArray[np.float64], expected: NDArray[np.float64]) -> bool:
    room = _CLOSE * np.abs(expected[np.isfinite(expected)]).max(initial=0.0)
    return bool(np.isclose(found, expected, rtol=0.0, atol=room, equal_nan=True).all())
