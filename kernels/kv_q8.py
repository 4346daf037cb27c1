"""The KV cache in 8 bits: of a head's key or value, every 32 items share a float16 scale.

This is the definition of the rounding, which executors follow bit by bit. The groups are those of q8 weights and of
llama.cpp's q8_0. Keys are rounded after rope. Where the model has a bias for them, it would leave no room in the levels
for what differs from token to token: Qwen2's are up to 200. So keys are first made less by what the bias adds at all
positions alike, which adds the same to all scores of a query, and softmax does not see that. Dimensions in which the
bias turns are made smaller, and queries larger there (as SmoothAttention does with measured sizes, arXiv:2405.04532).
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
_POSITIONS = 4096  # that a bias is looked at; another number would make older KV files wrong


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


def key_shape(config: ModelConfig, arrays: Mapping[str, NDArray]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What every key is less, and then divided by, before it is rounded: each (layers, kv heads, head_dim).

    The first is the mean of the rotated bias over the first positions: all of it in dimensions that turn slowly, and
    nothing in those that turn often. The second is how far the bias strays from that: half of its root mean square, to
    a power of 2, and at least 1. Queries are multiplied with it. `arrays` has the bias as k.bias, (layers, kv heads x
    head_dim); zeros and ones where there is none.
    """
    shape = (config.layer_count, config.kv_head_count, config.head_dim)
    offsets, factors = np.zeros(shape, np.float32), np.ones(shape, np.float32)
    if "k.bias" not in arrays or config.qk_norm:
        return offsets, factors
    bias = np.asarray(arrays["k.bias"], np.float32).reshape(shape)
    if config.rope is None:
        return bias, factors
    for layer in range(config.layer_count):
        if (rope := config.rope_of(layer)) is None:
            offsets[layer] = bias[layer]
            continue
        cos, sin = rope_tables(config, np.arange(_POSITIONS), rope)
        first, second = np.split(bias[layer], 2, axis=-1)
        c, s = cos.mean(0), sin.mean(0)
        offsets[layer] = np.concatenate([first * c - second * s, second * c + first * s], -1)
        strays = np.sqrt((first**2 + second**2) * np.maximum(0, (cos**2 + sin**2).mean(0) - c**2 - s**2))
        factors[layer] = np.tile(np.exp2(np.rint(np.log2(np.maximum(1, strays / 2)))), 2)
    return offsets, factors


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
