"""What down reads: act(gate) * up of neurons of a dense FFN."""

from __future__ import annotations

import numpy as np

from svdengine.kernels.cpu.elementwise import activate_row, scale_part, weigh_row
from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.model import GATE, LAYER_MATRICES, UP
from svdengine.kernels.cpu.quantize import quantize_groups
from svdengine.kernels.cpu.sharing import matmul

_ONE = np.float32(1)


@jit
def ffn_hidden(model, work, layer, normed, n, slot, weight, member, first, last):
    """weight * act(gate) * up of neurons first..last, and its quantised form for a down that reads all of it.

    slot: the row of work.gate, work.up and work.ffn_q that the first of the n rows takes.
    """
    own = member if n == 1 else 0
    x = normed + own * work.hidden_stride
    quantized = work.hidden_q + own * work.hidden_q_stride
    scratch = work.scratch + member * work.scratch_stride
    gate_at, up_at = work.gate + slot * work.ffn_stride, work.up + slot * work.ffn_stride
    base = layer * LAYER_MATRICES
    if model.gated:
        matmul(
            model.matrices[base + GATE], x, work.hidden_stride, quantized, work.hidden_q_stride,
            n, gate_at, work.ffn_stride, first, last, scratch, work.invariant,
        )  # fmt: skip
    matmul(
        model.matrices[base + UP], x, work.hidden_stride, quantized, work.hidden_q_stride,
        n, up_at, work.ffn_stride, first, last, scratch, work.invariant,
    )  # fmt: skip
    padded = model.ffn_stride if last == model.ffn else last
    for row in range(n):
        gate = gate_at + row * work.ffn_stride
        up = up_at + row * work.ffn_stride
        threshold = np.float32(model.threshold)
        activate_row(gate, up, gate, model.activation, threshold, model.gated, first, padded)
        if model.sub_norms:
            # The norm's weights now, and one over its root of a mean square when the FFN's sum is added.
            norm = model.ffn_sub_norm[layer, 0].ctypes.data
            weigh_row(gate, norm, work.unscaled + row * work.ffn_stride, first, padded)
        if weight != _ONE:
            scale_part(gate + 4 * first, weight, padded - first)
        if model.quantized and not model.transposed_down:
            quantize_groups(gate, work.ffn_q + (slot + row) * work.ffn_q_stride, model.ffn_stride, first, padded)
