"""What a model family is: how one kind of checkpoint names its settings and tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


def _only(arrays: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    return arrays[0]


@dataclass(frozen=True)
class Source:
    """Where a canonical tensor (of one layer) comes from: checkpoint tensors, and what makes ours out of them."""

    names: tuple[str, ...]  # tensors of the checkpoint, read as float32
    build: Callable[[Sequence[NDArray[np.float32]]], NDArray[np.float32]] = _only  # gives the logical shape of the spec
