"""The stages between matrix products: norms, activation functions, rotary embedding, and sums of rows.

Rows are float32 at integer addresses, padded with zeros to a multiple of 64, so that vectors need no tail.
"""

from __future__ import annotations

import math

import numpy as np

from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.model import DRELU, FATRELU, GELU, RELU, RELU2, SILU
from svdengine.kernels.cpu.simd import (
    absolute_f32,
    copy_sign,
    exp_f32,
    fma,
    load_f32,
    load_real,
    maximum_f32,
    select_greater,
    splat_f32,
    store_f32,
    store_real,
    sum_lanes,
    zero_f32,
)

_ZERO = np.float32(0)
_ONE = np.float32(1)
_TWO = np.float32(2)


@jit
def copy_row(source, to, columns):
    """to = source."""
    for i in range(0, 4 * columns, 64):
        store_f32(to + i, load_f32(source + i))


@jit
def clear_padding(x, columns, padded):
    """Zeros after the first `columns` floats of a row of `padded`."""
    for i in range(columns, padded):
        store_real(x + 4 * i, _ZERO)


@jit
def add_row(x, other, scale, columns):
    """x += scale * other."""
    s = splat_f32(scale)
    for i in range(0, 4 * columns, 64):
        store_f32(x + i, fma(load_f32(other + i), s, load_f32(x + i)))


@jit
def scale_row(x, scale, columns):
    """x *= scale."""
    s = splat_f32(scale)
    for i in range(0, 4 * columns, 64):
        store_f32(x + i, load_f32(x + i) * s)


@jit
def scale_part(x, scale, count):
    """x *= scale, of the first `count` floats of a row, which need not be a multiple of 16."""
    for i in range(0, 4 * count, 4):
        store_real(x + i, load_real(x + i) * scale)


@jit
def rms_norm(x, weight, out, columns, padded, eps):
    """out = x / sqrt(mean(x^2) + eps) * weight, over `columns`."""
    total = zero_f32()
    for i in range(0, 4 * padded, 64):
        v = load_f32(x + i)
        total = fma(v, v, total)
    scale = splat_f32(_ONE / np.float32(math.sqrt(sum_lanes(total) / np.float32(columns) + eps)))
    for i in range(0, 4 * padded, 64):
        store_f32(out + i, load_f32(x + i) * scale * load_f32(weight + i))


@jit
def layer_norm(x, weight, bias, out, columns, padded, eps):
    """out = (x - mean) / sqrt(variance + eps) * weight + bias, over `columns`."""
    total = zero_f32()
    for i in range(0, 4 * padded, 64):
        total = total + load_f32(x + i)
    mean = sum_lanes(total) / np.float32(columns)
    m = splat_f32(mean)
    total = zero_f32()
    for i in range(0, 4 * padded, 64):
        v = load_f32(x + i) - m
        total = fma(v, v, total)
    # The padding is zeros: each of its columns added mean^2.
    square = sum_lanes(total) - np.float32(padded - columns) * mean * mean
    scale = splat_f32(_ONE / np.float32(math.sqrt(square / np.float32(columns) + eps)))
    for i in range(0, 4 * padded, 64):
        store_f32(out + i, fma((load_f32(x + i) - m) * scale, load_f32(weight + i), load_f32(bias + i)))


@jit
def erf(x):
    """Error function of a vector, to 1.5e-7 (Abramowitz and Stegun 7.1.26)."""
    size = absolute_f32(x)
    t = splat_f32(_ONE) / fma(splat_f32(np.float32(0.3275911)), size, splat_f32(_ONE))
    p = splat_f32(np.float32(1.061405429))
    p = fma(p, t, splat_f32(np.float32(-1.453152027)))
    p = fma(p, t, splat_f32(np.float32(1.421413741)))
    p = fma(p, t, splat_f32(np.float32(-0.284496736)))
    p = fma(p, t, splat_f32(np.float32(0.254829592)))
    y = splat_f32(_ONE) - p * t * exp_f32(zero_f32() - size * size)
    return copy_sign(y, x)


@jit
def sigmoid(x):
    """1 / (1 + e^-x) of a vector."""
    return splat_f32(_ONE) / (splat_f32(_ONE) + exp_f32(zero_f32() - x))


@jit
def activate(x, kind, threshold):
    """The activation function of a vector (for dReLU, of one of its two factors)."""
    if kind == SILU:
        return x * sigmoid(x)
    if kind == RELU or kind == DRELU:
        return maximum_f32(x, zero_f32())
    if kind == FATRELU:
        return select_greater(x, splat_f32(threshold), x, zero_f32())
    if kind == RELU2:
        v = maximum_f32(x, zero_f32())
        return v * v
    if kind == GELU:
        half = x * splat_f32(np.float32(0.5))
        return fma(half, erf(x * splat_f32(np.float32(math.sqrt(0.5)))), half)
    # gelu_tanh: tanh(z) = 2 sigmoid(2 z) - 1
    z = x * fma(x * x, splat_f32(np.float32(0.044715)), splat_f32(_ONE))
    return x * sigmoid(z * splat_f32(_TWO * np.float32(math.sqrt(2 / math.pi))))


@jit
def activate_row(gate, up, out, kind, threshold, gated, first, last):
    """out = act(gate) * up over columns first..last, or act(up) when not gated."""
    for i in range(4 * first, 4 * last, 64):
        u = load_f32(up + i)
        if gated:
            if kind == DRELU:
                u = maximum_f32(u, zero_f32())
            store_f32(out + i, activate(load_f32(gate + i), kind, threshold) * u)
        else:
            store_f32(out + i, activate(u, kind, threshold))


@jit
def weigh_row(x, weight, unscaled, first, last):
    """Columns first..last: unscaled = x, and x *= weight."""
    for i in range(4 * first, 4 * last, 64):
        value = load_f32(x + i)
        store_f32(unscaled + i, value)
        store_f32(x + i, value * load_f32(weight + i))


@jit
def inverse_rms(x, columns, padded, eps):
    """1 / sqrt(mean(x^2) + eps), over `columns`."""
    total = zero_f32()
    for i in range(0, 4 * padded, 64):
        v = load_f32(x + i)
        total = fma(v, v, total)
    return _ONE / np.float32(math.sqrt(sum_lanes(total) / np.float32(columns) + eps))


@jit
def head_rms_norm(x, weight, head_dim, eps):
    """RMSNorm of one head in place; `weight` is an array of head_dim."""
    total = np.float32(0)
    for i in range(head_dim):
        total += load_real(x + 4 * i) * load_real(x + 4 * i)
    scale = _ONE / np.float32(math.sqrt(total / np.float32(head_dim) + eps))
    for i in range(head_dim):
        store_real(x + 4 * i, load_real(x + 4 * i) * scale * weight[i])


@jit
def rotate(x, cos, sin, half):
    """Rotary embedding of one head in place: dimension i pairs with i + half."""
    for i in range(half):
        a = load_real(x + 4 * i)
        b = load_real(x + 4 * (i + half))
        store_real(x + 4 * i, a * cos[i] - b * sin[i])
        store_real(x + 4 * (i + half), b * cos[i] + a * sin[i])


@jit
def scale_head(x, scale, head_dim):
    """One head times a number, in place."""
    for i in range(head_dim):
        store_real(x + 4 * i, load_real(x + 4 * i) * scale)
