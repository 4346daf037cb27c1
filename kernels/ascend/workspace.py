"""A step's memory on the device: its inputs, activations and what attention needs, allocated once for the largest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from svdengine.kernels.ascend.device import AscendDevice
from svdengine.kernels.ascend.tensor import Tensor
from svdengine.models import ModelConfig

_PIECE = 16  # elements: pieces of the mask begin at multiples, so that their addresses are aligned
_SCORES = 16 << 20  # float16 scores that a product of attention has room for, if one row needs no more


@dataclass(frozen=True)
class Inputs:
    """What a batch says, all in one storage: one copy a step."""

    words: Tensor  # (all,) int32
    tokens: Tensor  # (rows,) int32
    positions: Tensor  # (rows,) int32
    slots: Tensor  # (rows,) int32: where a row's key and value go
    logit_rows: Tensor  # (rows,) int32
    sparsity_bias: Tensor  # (rows,) float32
    tables: Tensor  # (rows, blocks) int32: the block table of each row's sequence
    row_words: int  # elements of a part that has one for each row


@dataclass(frozen=True)
class Workspace:
    """Activations of up to `rows` rows, float16 unless said otherwise; flat where their shape depends on a step."""

    rows: int
    block_size: int  # tokens in a KV block
    blocks: int  # of a sequence's table
    inputs: Inputs
    x: tuple[Tensor, Tensor]  # (rows, hidden): the residual stream, in one or the other
    normed: Tensor  # (rows, hidden)
    second: Tensor  # (rows, hidden): what the FFN reads, where it has a norm of its own in a parallel layer
    added: Tensor  # (rows, hidden): what attention or FFN adds to the stream
    inverse: Tensor  # (rows * heads,) float32: 1 / rms, which RMSNorm gives besides
    qkv: Tensor  # (rows * (heads + 2 kv heads) * head_dim,)
    turned_q: Tensor  # (rows, heads * head_dim), after norm or rope
    turned_k: Tensor  # (rows, kv heads * head_dim)
    attended: Tensor  # (rows, heads * head_dim)
    cos: Tensor  # (rows, head_dim)
    sin: Tensor
    gate_up: Tensor  # (rows * 2 ffn,)
    hidden: Tensor  # (rows, ffn): activations
    wanted: Tensor  # (rows, hidden): rows with logits
    logits: Tensor  # (rows, vocabulary)
    gathered_k: Tensor  # (blocks * block_size * kv heads * head_dim,): one sequence
    gathered_v: Tensor
    permuted_k: Tensor
    permuted_v: Tensor
    permuted_q: Tensor  # (rows * heads * head_dim,)
    mixed: Tensor  # (rows * heads * head_dim,)
    scores: Tensor  # (score_items,)
    shares: Tensor  # (score_items,): after softmax
    masks: Tensor  # (mask_items,) of all layers, then of those with a window

    @property
    def score_items(self) -> int:
        """Scores that a product of attention has room for."""
        return self.scores.size


def mask_piece(rows: int, length: int) -> int:
    """Elements that the mask of a sequence takes."""
    return -(-rows * length // _PIECE) * _PIECE


def workspace_bytes(config: ModelConfig, rows: int, context: int, block_size: int) -> int:
    """About the bytes of `allocate_workspace`."""
    heads, kv = config.head_count * config.head_dim, config.kv_head_count * config.head_dim
    per_row = 6 * config.hidden_size + 5 * heads + 4 * kv + 3 * config.ffn_size + config.vocab_size + 2 * context
    return 2 * (rows * per_row + 4 * (context + block_size) * kv + 2 * _score_items(config, rows, context))


def allocate_workspace(
    device: AscendDevice, config: ModelConfig, rows: int, context: int, block_size: int
) -> Workspace:
    """Memory for steps of up to `rows` rows, in sequences of up to `context` tokens."""
    blocks = -(-context // block_size)
    d, f, head = config.hidden_size, config.ffn_size, config.head_dim
    heads, kv = config.head_count * head, config.kv_head_count * head
    sequence = blocks * block_size * kv
    scores = _score_items(config, rows, context)

    def half(*shape: int) -> Tensor:
        return device.empty(shape, np.float16)

    return Workspace(
        rows=rows,
        block_size=block_size,
        blocks=blocks,
        inputs=_allocate_inputs(device, rows, blocks),
        x=(half(rows, d), half(rows, d)),
        normed=half(rows, d),
        second=half(rows, d),
        added=half(rows, d),
        inverse=device.empty((rows * max(config.head_count, 1),), np.float32),
        qkv=half(rows * (heads + 2 * kv)),
        turned_q=half(rows, heads),
        turned_k=half(rows, kv),
        attended=half(rows, heads),
        cos=half(rows, head),
        sin=half(rows, head),
        gate_up=half(rows * 2 * f),
        hidden=half(rows, f),
        wanted=half(rows, d),
        logits=half(rows, config.vocab_size),
        gathered_k=half(sequence),
        gathered_v=half(sequence),
        permuted_k=half(sequence),
        permuted_v=half(sequence),
        permuted_q=half(rows * heads),
        mixed=half(rows * heads),
        scores=half(scores),
        shares=half(scores),
        # Every row's piece is at most the context and what aligns its sequence's.
        masks=half((2 if config.sliding_window else 1) * rows * (blocks * block_size + _PIECE)),
    )


def spare_items(config: ModelConfig, rows: int, context: int) -> int:
    """Elements of the largest result that a substitute of an operator leaves between its steps."""
    heads = (config.head_count + 2 * config.kv_head_count) * config.head_dim
    return max(_score_items(config, rows, context), rows * max(config.hidden_size + 1, heads, 2 * config.ffn_size))


def _score_items(config: ModelConfig, rows: int, context: int) -> int:
    """Room for the scores of one row at least, and of many where contexts are short."""
    row = config.head_count * context
    return max(row, min(_SCORES, rows * row))


def _allocate_inputs(device: AscendDevice, rows: int, blocks: int) -> Inputs:
    """One storage, whose parts begin at multiples of 8 elements."""
    padded = -(-rows // 8) * 8
    words = device.zeros((5 * padded + rows * blocks,), np.int32)

    def part(index: int) -> Tensor:
        return words.rows(index * padded, rows)

    bias = part(4)
    floats = Tensor(bias.address, "float32", bias.storage, bias.shape, bias.strides, bias.offset)
    tables = words.rows(5 * padded, rows * blocks).reshape(rows, blocks)
    return Inputs(words, part(0), part(1), part(2), part(3), floats, tables, padded)
