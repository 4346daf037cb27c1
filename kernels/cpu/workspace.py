"""What a step works on besides the model: its buffers, the KV block pool, and the batch."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import numpy as np
from numpy.typing import NDArray

DENSE, PREDICT, SKIP_ZEROS = 0, 1, 2  # FFN modes; the last computes every gate and skips what is exactly 0
# Numbers of a step, in Inputs.sizes. KEPT: address for what enters the FFNs, or 0. GAP: see read_ahead.py. With
# ONLY_FFNS, a count of layers, a step is their FFNs alone, on inputs at SOURCE; SOURCE_LAYER: bytes from one layer's to
# the next one's, or 0 when all have the same. AHEAD: whether experts are asked for when they are chosen (experts.py).
# KEPT_EXPERTS: address for their numbers, or 0.
N_ROWS, WANTED, MODE, KEPT, GAP, ONLY_FFNS, SOURCE, SOURCE_LAYER, AHEAD, KEPT_EXPERTS, SIZES = range(11)
# Columns of a thread's counters, in Inputs.counts: its lists of the FFN blocks at hand, SLOTS at most, and after them
# numbers of each FFN block: neurons of sparse rows, and of an expert the rows that chose it on any path (experts.py).
# A thread's are on cache lines of their own.
SLOTS = 8  # FFN blocks of one row that run at once
LISTED, FIRST_BLOCK = 0, SLOTS
PREDICTED, ACTIVE, TOTAL, CHOSEN, BLOCK_COUNTS = range(5)
KV_F32, KV_F16, KV_Q8 = range(3)  # how keys and values are stored
# Fields of a team's synchronisation array, 8 int64 apart.
ARRIVED, EPOCH, CALLED, ASLEEP, CROWDED, PARKED = range(0, 48, 8)  # the parked flags of the members follow, 8 apart
ENDED = 1 << 62  # the epoch in which a team is to stop: one number says both, since cores may see two in any order
ATTENTION_STAGE, UP_STAGE, DOWN_STAGE, STAGES = range(4)  # whose work is claimed; the lm_head's comes after all layers


def quantized_bytes(columns: int) -> int:
    """Size of a quantised row of `columns` (quantize.py), a multiple of 64, rounded up to whole cache lines."""
    return -(-(2 * columns + 4 * columns // 8) // 64) * 64


class Workspace(NamedTuple):
    """Addresses of the buffers of a step. A row is as wide as its stride, in bytes."""

    invariant: bool  # a row gets the same bits whatever rows are beside it, and with any number of threads

    x: int  # residual stream
    hidden_stride: int
    normed: int
    second: int  # input of a parallel FFN that has a norm of its own; or what is added, after a norm of its own
    hidden_q: int  # quantised `normed`
    hidden_q_stride: int
    q: int
    q_stride: int
    k: int
    v: int
    kv_stride: int
    attention: int
    attention_stride: int
    attention_q: int
    attention_q_stride: int
    partial: int  # in decode: running sums of each head over a thread's part of the context
    attention_add: int  # what attention adds to x
    ffn_add: int  # what the FFN adds; with neuron-major down, one row a thread in decode
    sums: int  # int32 of the size of ffn_add, zeros but while neuron-major rows are added
    gate: int
    up: int
    ffn_stride: int
    unscaled: int  # (rows, ffn) what down's norm is taken over, where it has one; strides as those of gate
    ffn_q: int
    ffn_q_stride: int
    z: int  # hidden values of the predictor, one row a thread; in decode all share the first
    z_stride: int
    z_q: int
    z_q_stride: int
    neurons: int  # lists of neurons, int32, likewise
    neurons_stride: int
    router: int  # a router's products, of one layer; decode has one row
    router_stride: int
    chosen: int  # numbers of each row's experts, int32; in decode one row a thread
    weights: int  # what their outputs are multiplied by
    chosen_stride: int
    group: int  # address of a record like this: the buffers of rows that chose the same expert
    group_inputs: int  # address of their Inputs
    group_rows: int  # one a thread: numbers of these rows, int32, then their weights
    group_rows_stride: int
    logits: int
    logits_stride: int
    scratch: int  # one a thread
    scratch_stride: int


class Cache(NamedTuple):
    """The KV block pool: [layer][kv head][block][...], keys dimension-major, values token-major."""

    keys: int
    values: int
    key_head: int  # bytes of one block of one head
    value_head: int
    blocks: int
    key_dim: int  # dimensions of a stored key: head_dim, padded
    kind: int  # KV_F32, KV_F16 or KV_Q8, of attention_tile.py
    offsets: int  # (layers, kv heads, key_dim) float32: what keys are stored without; only in 8 bits, as is the next
    factors: int  # of the same shape: what they are divided by then


class Inputs(NamedTuple):
    """The batch, in arrays that live as long as the executor."""

    sizes: Annotated[NDArray[np.int64], 1]  # (SIZES,)
    tokens: Annotated[NDArray[np.int32], 1]
    positions: Annotated[NDArray[np.int32], 1]
    sequences: Annotated[NDArray[np.int32], 1]
    block_tables: Annotated[NDArray[np.int32], 2]
    logit_rows: Annotated[NDArray[np.int32], 1]
    sparsity_bias: Annotated[NDArray[np.float32], 1]  # of each sequence
    claims: Annotated[NDArray[np.int64], 1]  # (blocks * STAGES + 1,) zeros when a step begins
    counts: Annotated[NDArray[np.int64], 2]  # (threads, columns) by FFN block
