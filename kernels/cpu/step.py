"""One step of the model, from tokens to logits, as compiled code that every thread of the team runs."""

from __future__ import annotations

import numpy as np

from svdengine.kernels.cpu.attention_stage import attention, norm_joint, place_keys, project_attention, project_qkv
from svdengine.kernels.cpu.elementwise import (
    add_row,
    clear_padding,
    copy_row,
    inverse_rms,
    layer_norm,
    rms_norm,
    scale_row,
)
from svdengine.kernels.cpu.experts import choose_experts, experts, route
from svdengine.kernels.cpu.ffn_stage import any_ffn, keep_ffn_inputs
from svdengine.kernels.cpu.formats.dispatch import load_weights
from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.model import EMBEDDING, LAYER_MATRICES, LM_HEAD
from svdengine.kernels.cpu.pieces import piece
from svdengine.kernels.cpu.quantize import quantize_groups
from svdengine.kernels.cpu.sharing import counter_of, matmul_together, ready, rows_of
from svdengine.kernels.cpu.simd import load_real, store_f32, store_real, zero_f32
from svdengine.kernels.cpu.sync import barrier, exchange, fetch_add, load_shared, wait_for_work
from svdengine.kernels.cpu.workspace import (
    CALLED,
    ENDED,
    EPOCH,
    MODE,
    N_ROWS,
    ONLY_FFNS,
    PARKED,
    PREDICT,
    SOURCE,
    SOURCE_LAYER,
    WANTED,
)


@jit
def embed(model, work, inputs, n, member, threads):
    """Residual stream = embedding of the tokens (+ position)."""
    first, last = rows_of(n, member, threads)
    for row in range(first, last):
        token = inputs.tokens[0 if n == 1 else row]
        x = work.x + row * work.hidden_stride
        matrix = model.matrices[model.blocks * LAYER_MATRICES + EMBEDDING]
        for column in range(0, model.hidden_stride, 16):
            store_f32(x + 4 * column, load_weights(matrix, token, column))
        if model.embedding_scale != 1.0:
            scale_row(x, np.float32(model.embedding_scale), model.hidden_stride)
        if model.learned_positions:
            position = inputs.positions[0 if n == 1 else row]
            table = model.positions[position]
            for column in range(model.hidden):
                store_real(x + 4 * column, load_real(x + 4 * column) + table[column])


@jit
def normalize(model, work, norms, out, n, member, threads, quantize):
    """out = norm(x), and its quantised form if wanted; norms: (2, hidden) weight and bias."""
    weight, bias = norms[0].ctypes.data, norms[1].ctypes.data
    first, last = rows_of(n, member, threads)
    eps = np.float32(model.norm_eps)
    for row in range(first, last):
        x = work.x + row * work.hidden_stride
        y = out + row * work.hidden_stride
        if model.layer_norm:
            layer_norm(x, weight, bias, y, model.hidden, model.hidden_stride, eps)
        else:
            rms_norm(x, weight, y, model.hidden, model.hidden_stride, eps)
        if quantize:
            quantize_groups(y, work.hidden_q + row * work.hidden_q_stride, model.hidden_stride, 0, model.hidden_stride)


@jit
def add_to_residual(model, work, addend, parts, n, member, threads, of_ffn):
    """x += residual_scale * addend; in decode the addend may come in several parts, one a row.

    What an FFN adds is divided here by the root mean square of what down read, where that has a norm.

    The padding of x stays 0, as norms need it: that of an addend need not be, since 4 bits do not hold every 0 exactly.
    """
    scale = np.float32(model.residual_scale)
    first, last = rows_of(n, member, threads)
    for row in range(first, last):
        x = work.x + row * work.hidden_stride
        if of_ffn and model.sub_norms:
            unscaled = work.unscaled + (0 if n == 1 else row) * work.ffn_stride
            root = inverse_rms(unscaled, model.ffn, model.ffn_stride, np.float32(model.norm_eps))
            scale = np.float32(model.residual_scale) * root
        if n == 1:
            for part in range(parts):
                add_row(x, addend + part * work.hidden_stride, scale, model.hidden_stride)
        else:
            add_row(x, addend + row * work.hidden_stride, scale, model.hidden_stride)
        clear_padding(x, model.hidden, model.hidden_stride)


@jit
def add_normed(model, work, norms, addend, parts, n, member, threads):
    """x += residual_scale * RMSNorm(addend), whose parts are as `add_to_residual` has them."""
    first, last = rows_of(n, member, threads)
    scale, eps = np.float32(model.residual_scale), np.float32(model.norm_eps)
    for row in range(first, last):
        total = work.second + row * work.hidden_stride
        copy_row(addend + (0 if n == 1 else row) * work.hidden_stride, total, model.hidden_stride)
        if n == 1:
            for part in range(1, parts):
                add_row(total, addend + part * work.hidden_stride, np.float32(1), model.hidden_stride)
        clear_padding(total, model.hidden, model.hidden_stride)
        rms_norm(total, norms[0].ctypes.data, total, model.hidden, model.hidden_stride, eps)
        add_row(work.x + row * work.hidden_stride, total, scale, model.hidden_stride)


@jit
def add_attention(model, work, layer, n, member, threads):
    """Residual stream += what attention gives."""
    if model.post_norms:
        add_normed(model, work, model.attention_post_norm[layer], work.attention_add, 1, n, member, threads)
    else:
        add_to_residual(model, work, work.attention_add, 1, n, member, threads, False)


@jit
def layer_step(model, work, cache, inputs, layer, n, member, threads, sync):
    """One layer: x += attention(norm(x)); x += ffn(norm(x)); or both from the same x."""
    # The predictor reads the quantised input whatever the weights' format is.
    quantize = model.quantized or inputs.sizes[MODE] == PREDICT
    normalize(model, work, model.attention_norm[layer], work.normed, n, member, threads, quantize)
    ready(n, sync, threads)
    if model.experts > 0 and model.early_router:
        route(model, work, layer, work.x, n, member, threads)
    project_qkv(model, work, layer, n, member, threads)
    barrier(sync, threads)
    if model.experts > 0 and model.early_router:  # they are on their way from storage while attention runs
        choose_experts(model, work, inputs, layer, n, member, threads)
    if model.qk_norm_joint:
        norm_joint(model, work, layer, n, member, threads)
        barrier(sync, threads)
    place_keys(model, work, cache, inputs, layer, n, member, threads)
    barrier(sync, threads)
    attention(model, work, cache, inputs, layer, n, member, threads)
    barrier(sync, threads)
    project_attention(model, work, inputs, layer, n, member, threads, sync)
    barrier(sync, threads)
    normed = work.normed
    if model.parallel:
        if not model.shared_norm:
            normed = work.second
            normalize(model, work, model.ffn_norm[layer], normed, n, member, threads, quantize)
        add_to_residual(model, work, work.attention_add, 1, n, member, threads, False)
    else:
        add_attention(model, work, layer, n, member, threads)
        normalize(model, work, model.ffn_norm[layer], normed, n, member, threads, quantize)
    keep_ffn_inputs(model, work, inputs, layer, normed, n, member, threads)
    ready(n, sync, threads)
    if model.experts > 0:
        if not model.early_router:
            route(model, work, layer, normed, n, member, threads)
            barrier(sync, threads)
            choose_experts(model, work, inputs, layer, n, member, threads)
            ready(n, sync, threads)
        experts(model, work, inputs, layer, normed, n, member, threads, sync)
        return
    parts = any_ffn(model, work, inputs, layer, normed, n, member, threads, sync)
    if model.post_norms:
        add_normed(model, work, model.ffn_post_norm[layer], work.ffn_add, parts, n, member, threads)
    else:
        add_to_residual(model, work, work.ffn_add, parts, n, member, threads, True)


@jit
def logits(model, work, inputs, n, wanted, member, threads, sync):
    """Logits of the wanted rows: final norm, then the lm_head, shared out by vocabulary."""
    ready(n, sync, threads)
    weight, bias = model.output_norm[0].ctypes.data, model.output_norm[1].ctypes.data
    eps = np.float32(model.norm_eps)
    first, last = rows_of(wanted, member, threads)
    for row in range(first, last):
        source = inputs.logit_rows[0 if wanted == 1 else row]
        x = work.x + (member if n == 1 else source) * work.hidden_stride
        y = work.normed + row * work.hidden_stride
        if model.layer_norm:
            layer_norm(x, weight, bias, y, model.hidden, model.hidden_stride, eps)
        else:
            rms_norm(x, weight, y, model.hidden, model.hidden_stride, eps)
        if model.logit_scale != 1.0:
            scale_row(y, np.float32(model.logit_scale), model.hidden_stride)
        if model.head_quantized:
            quantize_groups(y, work.hidden_q + row * work.hidden_q_stride, model.hidden_stride, 0, model.hidden_stride)
    ready(wanted, sync, threads)
    own = member if wanted == 1 else 0
    matmul_together(
        model.matrices[model.blocks * LAYER_MATRICES + LM_HEAD],
        work.normed + own * work.hidden_stride, work.hidden_stride,
        work.hidden_q + own * work.hidden_q_stride, work.hidden_q_stride,
        wanted, work.logits, work.logits_stride, model.vocabulary, work.scratch + member * work.scratch_stride,
        work.invariant, member, threads, counter_of(inputs, model.blocks, 0),
    )  # fmt: skip
    barrier(sync, threads)


@jit
def only_ffns(model, work, inputs, n, member, threads, sync):
    """Residual stream = the sum of what the first layers' FFNs give, each on an input of its own."""
    first, last = rows_of(n, member, threads)
    for row in range(first, last):
        for column in range(0, 4 * model.hidden_stride, 64):
            store_f32(work.x + row * work.hidden_stride + column, zero_f32())
    for layer in range(inputs.sizes[ONLY_FFNS]):
        source = inputs.sizes[SOURCE] + layer * inputs.sizes[SOURCE_LAYER]
        for row in range(first, last):
            normed = work.normed + row * work.hidden_stride
            copy_row(source + (0 if n == 1 else row) * work.hidden_stride, normed, model.hidden_stride)
            if model.quantized or inputs.sizes[MODE] == PREDICT:
                quantized = work.hidden_q + row * work.hidden_q_stride
                quantize_groups(normed, quantized, model.hidden_stride, 0, model.hidden_stride)
        ready(n, sync, threads)
        if model.experts > 0:
            route(model, work, layer, work.normed, n, member, threads)
            barrier(sync, threads)
            choose_experts(model, work, inputs, layer, n, member, threads)
            ready(n, sync, threads)
            experts(model, work, inputs, layer, work.normed, n, member, threads, sync)
        else:
            parts = any_ffn(model, work, inputs, layer, work.normed, n, member, threads, sync)
            add_to_residual(model, work, work.ffn_add, parts, n, member, threads, True)
        barrier(sync, threads)  # the next FFN writes where others may still read


@jit
def forward(model, work, cache, inputs, member, threads, sync):
    """A whole step, or FFNs alone. Every member of the team calls it."""
    n, wanted = inputs.sizes[N_ROWS], inputs.sizes[WANTED]
    if inputs.sizes[ONLY_FFNS] > 0:
        only_ffns(model, work, inputs, n, member, threads, sync)
        return
    embed(model, work, inputs, n, member, threads)
    for layer in range(model.layers):
        layer_step(model, work, cache, inputs, layer, n, member, threads, sync)
    if wanted > 0:
        logits(model, work, inputs, n, wanted, member, threads, sync)
    else:
        barrier(sync, threads)


@piece
def run(model, work, cache, inputs, member, threads, sync, seen):
    """What a thread of the team does. The first one runs one step; the others wait for steps and run them.

    Returns the last epoch seen, or -1 when the team is to stop.
    """
    if member == 0:
        fetch_add(sync + 8 * EPOCH, 1)
        forward(model, work, cache, inputs, member, threads, sync)
        return seen
    exchange(sync + 8 * (PARKED + 8 * member), 0)
    while True:
        epoch = wait_for_work(sync, member, seen)
        if epoch < 0:
            return seen
        if epoch >= ENDED:
            return np.int64(-1)
        seen = epoch
        forward(model, work, cache, inputs, member, threads, sync)


@piece
def call_members(sync, threads, parked):
    """Keep members from parking, and note in `parked`, int64 a member, which of them have and must be woken."""
    exchange(sync + 8 * CALLED, 1)
    for member in range(1, threads):
        exchange(parked + 8 * member, load_shared(sync + 8 * (PARKED + 8 * member)))
