"""How much room the library's float16 copies take: as much as a model's formats need, and no more.

The library multiplies matrices in float16 or float32 where they lie. Of other formats, and of matrices that lie partly
in host memory, a float16 copy is made for each product. The head, which is several times larger than any other matrix
and rarely has many rows, is copied in slices no larger than these.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from svdengine.kernels.cuda.formats.table import kernels_of
from svdengine.kernels.cuda.workspace import Sizes
from svdengine.kernels.formats import WeightFormat, padded_columns
from svdengine.models import ModelConfig, tensor_specs

_JOINED = (("q", "k", "v"), ("gate", "up"))  # one matrix on the device where neighbours have the same format
_HEAD = ("embedding", "lm_head", "position_embedding")  # no part of a layer
_FFN = ("gate", "up", "down", "down_T")


def copy_items(
    config: ModelConfig, formats: Mapping[str, WeightFormat], sizes: Sizes, split: bool = False
) -> tuple[int, int]:
    """Items of the copy of a matrix, and of the copy of activations; (0, 0) where nothing is copied.

    `split`: whether the FFN's matrices may lie partly in host memory.
    """
    types = {name: kernels_of(stored).library_type for name, stored in formats.items()}
    shapes = {spec.name: spec.shape[-2:] for spec in tensor_specs(config) if spec.matrix}
    layer = {name: shape[0] * padded_columns(shape[1]) for name, shape in shapes.items() if name not in _HEAD}
    if config.expert_count:  # which kernels/cuda/experts.py multiplies
        layer = {name: items for name, items in layer.items() if name not in _FFN}
    copied = {name: items for name, items in layer.items() if types[name] is None or (split and name in _FFN)}
    weights = max(copied.values(), default=0)
    for names in _JOINED:
        weights = max(weights, sum(items for name, items in copied.items() if name in names))
    head = "embedding" if config.tied_embeddings else "lm_head"
    if types[head] is None and not weights:  # only the head is copied, in slices of as much as the largest of a layer
        weights = max(layer.values())
    narrowed = any(kind is not np.float32 for name, kind in types.items() if name in layer or name == head)
    widest = max(sizes.hidden, sizes.attention, sizes.ffn)
    return weights, sizes.rows * widest if narrowed or weights else 0


def slice_rows(rows: int, stride: int, items: int) -> int:
    """Rows of a matrix, `stride` items each, that are multiplied at once where a copy has room for `items`."""
    return max(1, min(rows, items // stride)) if items else rows
