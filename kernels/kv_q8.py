"""The KV cache in 8 bits: of a head's key or value, every 32 items share a float16 scale.

This is the definition of the rounding, which executors follow bit by bit. The groups are those of q8 weights and of
llama.cpp's q8_0. Keys are rounded after rope, less an offset where the model has a bias for them. What is the same in
the keys of all positions adds the same to all scores of a query, which softmax does not see. Qwen2 has biases of 200 in
dimensions that hardly turn; in the levels they would leave no room for what differs from token to token.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from svdengine.kernels.rope import rope_tables
from svdengine.models.config import ModelConfig

GROUP = 32  # items of a head that share a scale; the last group of a head may have fewer
PACKED = 2 + GROUP  # bytes of a group outside an executor: the scale, then the levels
_LARGEST = np.float32(127)
_OFFSET_POSITIONS = 4096  # that the offset is the mean over; another number would make older KV files wrong


def group_count(head_dim: int) -> int:
    """Groups of a head."""
    return -(-head_dim // GROUP)


def quantize_kv(x: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Levels (..., groups, 32) in -127..127 and scales (..., groups) of heads (..., head_dim), padded with zeros.

    A group that is not finite has a scale that is not.
    """
    groups = group_count(x.shape[-1])
    padded = np.zeros((*x.shape[:-1], groups * GROUP), np.float32)
    padded[..., : x.shape[-1]] = x
    padded = padded.reshape(*x.shape[:-1], groups, GROUP)
    with np.errstate(over="ignore", invalid="ignore"):
        scale = (np.abs(padded).max(-1) / _LARGEST).astype(np.float16)
        usable = np.isfinite(scale) & (scale > 0)
        step = np.where(usable, scale, np.float16(1)).astype(np.float32)[..., None]
        level = np.rint(np.where(usable[..., None], padded, 0) / step)
    return np.clip(level, -_LARGEST, _LARGEST).astype(np.int8), scale


def key_offsets(config: ModelConfig, arrays: Mapping[str, NDArray]) -> NDArray[np.float32]:
    """What is taken from the keys of every position: (layers, kv heads, head_dim), zeros where `k` has no bias.

    It is the mean of the rotated bias over the first positions: all of it in dimensions that turn slowly, and nothing
    in those that turn often. `arrays` has the bias as k.bias, (layers, kv heads x head_dim).
    """
    shape = (config.layer_count, config.kv_head_count, config.head_dim)
    if "k.bias" not in arrays or config.qk_norm:
        return np.zeros(shape, np.float32)
    bias = np.asarray(arrays["k.bias"], np.float32).reshape(shape)
    if config.rope is None:
        return bias
    offsets = np.empty_like(bias)
    for layer in range(config.layer_count):
        tables = rope_tables(config, np.arange(_OFFSET_POSITIONS), config.rope_of(layer))
        cos, sin = (table.mean(0) for table in tables)
        first, second = np.split(bias[layer], 2, axis=-1)
        offsets[layer] = np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return offsets


def dequantize_kv(level: NDArray[np.int8], scale: NDArray[np.float16], head_dim: int) -> NDArray[np.float32]:
    """The heads (..., head_dim) that levels and scales stand for."""
    with np.errstate(invalid="ignore"):  # a scale that is not finite
        x = level * scale.astype(np.float32)[..., None]
    return np.ascontiguousarray(x.reshape(*x.shape[:-2], -1)[..., :head_dim])


def pack_kv(level: NDArray[np.int8], scale: NDArray[np.float16]) -> NDArray[np.uint8]:
    """Levels and scales in one array (..., groups, PACKED), as `BlockStore` and KV files have them."""
    packed = np.empty((*scale.shape, PACKED), np.uint8)
    packed[..., :2] = np.ascontiguousarray(scale)[..., None].view(np.uint8)
    packed[..., 2:] = level.view(np.uint8)
    return packed


def unpack_kv(packed: NDArray[np.uint8]) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Levels and scales of what `pack_kv` made."""
    return np.ascontiguousarray(packed[..., 2:]).view(np.int8), packed_scales(packed)


def packed_scales(packed: NDArray[np.uint8]) -> NDArray[np.float16]:
    """The scales (..., groups) of packed groups."""
    return np.ascontiguousarray(packed[..., :2]).view(np.float16)[..., 0]
