"""The buffers of a step on the device. All are flat; a row of a buffer is as wide as its stride, in items.

Rows are padded with zeros to a multiple of 64 columns, as weights are, and no kernel writes the padding: products read
whole chunks of it. Buffers live as long as the executor, since recorded graphs hold their addresses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svdengine.kernels.batch import BLOCK_SIZE
from svdengine.kernels.cuda.chosen import GROUP
from svdengine.kernels.formats import padded_columns
from svdengine.kernels.predictor import largest_rank
from svdengine.models import ModelConfig

Array = Any  # of the device: flat, see kernels/cuda/device.py

LEAST_PARTS = 64  # blocks over which work on few rows is split, whose results are added afterwards
PREDICTED, ACTIVE, TOTAL, COUNTS = range(4)  # of a layer's counts
CHOICE_NUMBERS = 5  # float64 of a row that say how its token is chosen
SLICES = 64  # of a vocabulary, which blocks survey side by side before a token is chosen
BINS = 1024  # of the distance to the largest logit
MOST_LISTED = 2048  # tokens that filters may keep of a row, beyond which it is read whole


@dataclass(frozen=True)
class Sizes:
    """How large a workspace is: its most rows, and the strides of its buffers in items."""

    rows: int
    pairs: int  # of a row and an FFN block that it has; as many as rows, unless the model is a mixture of experts
    blocks: int  # in a block table
    ffn_blocks: int  # of a layer, at most
    hidden: int
    qkv: int  # q heads, k heads and v heads of a row, one after another
    attention: int
    gate_up: int  # all gates of a row, then all its ups; only ups where the FFN is not gated
    ffn: int
    z: int  # hidden values of a predictor, of which there may be one later
    logits: int
    partial: int  # items of `partial`
    layers: int
    heads: int  # of q, k and v
    routed: int  # what a router makes of a row

    @classmethod
    def of(cls, config: ModelConfig, rows: int, context: int) -> Sizes:
        """Sizes for steps of up to `rows` rows and sequences of up to `context` tokens."""
        heads, kv = config.head_count * config.head_dim, config.kv_head_count * config.head_dim
        hidden = padded_columns(config.hidden_size)
        sums = config.head_count * (config.head_dim + 2)  # of attention: a running sum, a maximum and a total a head
        pairs = rows * (max(config.chosen_blocks, config.dense_blocks) if config.expert_count else 1)
        return cls(
            rows=rows,
            pairs=pairs,
            ffn_blocks=max(len(config.blocks_of(layer)) for layer in range(config.layer_count)),
            blocks=-(-context // BLOCK_SIZE),
            hidden=hidden,
            qkv=padded_columns(heads + 2 * kv),
            attention=padded_columns(heads),
            gate_up=padded_columns((2 if config.gated else 1) * config.ffn_size),
            ffn=padded_columns(config.ffn_size),
            z=padded_columns(largest_rank(config.hidden_size, config.ffn_size, relu=True)),
            logits=padded_columns(config.vocab_size),
            partial=max(max(LEAST_PARTS, rows) * max(hidden, sums), max(LEAST_PARTS, pairs) * hidden),
            layers=config.layer_count,
            heads=config.head_count + 2 * config.kv_head_count,
            routed=padded_columns(max(1, config.router_rows)),
        )


@dataclass(frozen=True)
class Workspace:
    """What a step reads and writes besides weights and KV blocks; arrays of the device, by row."""

    sizes: Sizes

    # The batch, written by the host before a step: parts of `inputs`, which is uploaded at once.
    inputs: Array  # int32
    choice_numbers: Array  # (CHOICE_NUMBERS, rows) float64, for each row with logits: see kernels/cuda/sampling.py
    choice_top_k: Array  # (rows,) int32
    tokens: Array  # (rows,) int32
    positions: Array  # (rows,) int32
    sequences: Array  # (rows,) int32: row of `block_tables`
    logit_rows: Array  # (rows,) int32
    tiles: Array  # (rows, 2) int32: first row and count of rows of a sequence that attend together
    sparsity_bias: Array  # (rows,) float32 of each row
    block_tables: Array  # (rows, blocks) int32

    # The residual stream and attention.
    x: Array  # (rows, hidden) float32: the residual stream
    normed: Array  # (rows, hidden) float32
    second: Array  # (rows, hidden) float32: read by a parallel FFN with its own norm; or normed and added. In a mixture
    # of experts (pairs, hidden) words: what FFN blocks read, sorted by block
    qkv: Array  # (rows, qkv) float32
    attention: Array  # (rows, attention) float32
    partial: Array  # (rows, parts, hidden) float32 to be added, where rows * parts <= max(LEAST_PARTS, rows)

    rounded: Array  # (rows, hidden, attention or ffn) words: what a product reads, rounded (kernels/cuda/rounding.py)

    # The FFN blocks that rows have in a mixture of experts: kernels/cuda/chosen.py and pair_groups.py.
    routed: Array  # (rows, routed) float32: what the router makes of rows
    blocks: Array  # (pairs,) int32: the block of each pair
    weights: Array  # (pairs,) float32: what the block's output is multiplied by
    order: Array  # (pairs,) int32: pairs, sorted by block
    places: Array  # (pairs,) int32: where in `order` each pair is
    starts: Array  # (ffn_blocks + 1,) int32: where in `order` those of each block begin
    groups: Array  # two lists of tiles of sorted pairs, GROUP int32 each

    # The FFN. In a mixture of experts rows are pairs here, but for those of `fine` and `coarse`.
    gate_up: Array  # (rows, gate_up) float32
    hidden: Array  # (rows, ffn) float32: act(gate) * up; on the sparse path of those neurons that are listed
    z_rounded: Array  # (rows, z) words: hidden values of the predictor, rounded as kernels/cuda/rounding.py says
    fine: Array  # (rows, hidden) words: the FFN's input rounded to 16 bits, likewise
    coarse: Array  # (rows, hidden) words: to 8 bits
    scores: Array  # (rows, ffn) float32; once neurons are listed, their gates
    neurons: Array  # (rows, ffn) int32: predicted active, ascending
    lengths: Array  # (rows,) int32 of `neurons`
    masks: Array  # (rows, ffn / 32) uint32: a bit for each neuron that is predicted active
    tickets: Array  # int32: blocks of a row or of a head that are done, while a kernel runs; zeros between kernels
    counts: Array  # (layers, COUNTS) int64: predicted, active and all neurons of rows that took the sparse path

    logits: Array  # (rows, logits) float32
    chosen: Array  # (rows,) int32: tokens of those rows of logits that have a choice

    # Sampling: see kernels/cuda/sample_survey.py.
    tops: Array  # (rows, SLICES) int64
    slice_weights: Array  # (rows, SLICES) int64
    bin_counts: Array  # (rows, BINS) int32
    bin_weights: Array  # (rows, BINS) int64
    listed: Array  # (rows,) int32
    candidates: Array  # (rows, MOST_LISTED) int32


def buffer_shapes(sizes: Sizes) -> dict[str, tuple[int, type]]:
    """Items and type of each buffer."""
    rows, pairs, f32, i32 = sizes.rows, sizes.pairs, np.float32, np.int32
    return {
        "inputs": (inputs_size(sizes), i32),
        "x": (rows * sizes.hidden, f32),
        "normed": (rows * sizes.hidden, f32),
        "second": (pairs * sizes.hidden, f32),
        "qkv": (rows * sizes.qkv, f32),
        "attention": (rows * sizes.attention, f32),
        "partial": (sizes.partial, f32),
        "rounded": (max(rows * max(sizes.hidden, sizes.attention), pairs * sizes.ffn), f32),
        "routed": (rows * sizes.routed, f32),
        "blocks": (pairs, i32),
        "weights": (pairs, f32),
        "order": (pairs, i32),
        "places": (pairs, i32),
        "starts": (sizes.ffn_blocks + 1, i32),
        "groups": (2 * 2 * pairs * GROUP, i32),  # of two lists, each at most two tiles for a pair
        "gate_up": (pairs * sizes.gate_up, f32),
        "hidden": (pairs * sizes.ffn, f32),
        "z_rounded": (pairs * sizes.z, f32),
        "fine": (rows * sizes.hidden, f32),
        "coarse": (rows * sizes.hidden, f32),
        "scores": (pairs * sizes.ffn, f32),
        "neurons": (pairs * sizes.ffn, i32),
        "lengths": (pairs, i32),
        "masks": (pairs * (sizes.ffn // 32), np.uint32),
        "tickets": (max(pairs, sizes.heads), i32),
        "counts": (sizes.layers * COUNTS, np.int64),
        "logits": (rows * sizes.logits, f32),
        "chosen": (rows, i32),
        "tops": (rows * SLICES, np.int64),
        "slice_weights": (rows * SLICES, np.int64),
        "bin_counts": (rows * BINS, i32),
        "bin_weights": (rows * BINS, np.int64),
        "listed": (rows, i32),
        "candidates": (rows * MOST_LISTED, i32),
    }


def workspace_bytes(sizes: Sizes) -> int:
    """Bytes of all buffers."""
    return sum(items * np.dtype(dtype).itemsize for items, dtype in buffer_shapes(sizes).values())


def allocate_workspace(device: Any, sizes: Sizes) -> Workspace:
    """Zeroed buffers on the device."""
    buffers = {name: device.zeros(items, dtype) for name, (items, dtype) in buffer_shapes(sizes).items()}
    inputs = buffers["inputs"]
    parts = {name: inputs[start:end].view(dtype) for name, (start, end, dtype) in input_parts(sizes).items()}
    return Workspace(sizes=sizes, **parts, **buffers)


def input_parts(sizes: Sizes) -> dict[str, tuple[int, int, type]]:
    """Where each part of `inputs` begins and ends, in items of `inputs`, and its type. What has 64 bits comes first."""
    rows, f32, i32 = sizes.rows, np.float32, np.int32
    lengths = {
        "choice_numbers": (2 * CHOICE_NUMBERS * rows, np.float64),
        "choice_top_k": (rows, i32),
        "tokens": (rows, i32),
        "positions": (rows, i32),
        "sequences": (rows, i32),
        "logit_rows": (rows, i32),
        "tiles": (2 * rows, i32),
        "sparsity_bias": (rows, f32),
        "block_tables": (rows * sizes.blocks, i32),
    }
    parts: dict[str, tuple[int, int, type]] = {}
    start = 0
    for name, (length, dtype) in lengths.items():
        parts[name] = (start, start + length, dtype)
        start += length
    return parts


def inputs_size(sizes: Sizes) -> int:
    """Items of `inputs`."""
    return input_parts(sizes)["block_tables"][1]


def pack_inputs(sizes: Sizes, values: Mapping[str, NDArray], to: NDArray[np.int32] | None = None) -> NDArray[np.int32]:
    """What is written to the beginning of `inputs`: each part's first items; what lies behind them is zero.

    It ends with the last item of the block tables. It is made at the beginning of `to`, where that is given.
    """
    size = input_parts(sizes)["block_tables"][0] + values["block_tables"].size
    return _packed(sizes, values, np.empty(size, np.int32) if to is None else to[:size])


def pack_parts(sizes: Sizes, values: Mapping[str, NDArray], to: NDArray[np.int32]) -> NDArray[np.int32]:
    """As `pack_inputs`, up to the end of the last of `values`, which begin with the first part."""
    return _packed(sizes, values, to[: max(input_parts(sizes)[name][1] for name in values)])


def _packed(sizes: Sizes, values: Mapping[str, NDArray], packed: NDArray[np.int32]) -> NDArray[np.int32]:
    parts, packed[:] = input_parts(sizes), 0
    for name, value in values.items():
        start, _, dtype = parts[name]
        words = np.ascontiguousarray(value, dtype).reshape(-1).view(np.int32)
        packed[start : start + len(words)] = words
    return packed


def parts_of(rows: int) -> int:
    """In how many parts work on each of `rows` rows may be split, so that `partial` holds them."""
    return max(1, LEAST_PARTS // rows)
