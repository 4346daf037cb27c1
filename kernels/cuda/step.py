"""One step of the model, from tokens to logits and the tokens chosen from them, as launches on a device's stream.

A step of one row, which is what decoding waits for, takes fewer launches than others: kernels/cuda/single_row.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from svdengine.kernels.cuda.attention import attend
from svdengine.kernels.cuda.device import Array
from svdengine.kernels.cuda.elementwise import activate_ffn, add_parts, clear
from svdengine.kernels.cuda.embedding import embed_tokens
from svdengine.kernels.cuda.experts import dense_experts, reads_rounded
from svdengine.kernels.cuda.formats.table import kernels_of
from svdengine.kernels.cuda.gemm import add_transposed_product, product, rounded_rows, takes_rounded, uses_library
from svdengine.kernels.cuda.gemv import multiply_transposed
from svdengine.kernels.cuda.half_copies import slice_rows
from svdengine.kernels.cuda.model import LayerWeights, Matrix, Norm
from svdengine.kernels.cuda.norm import Following, add_parts_and_normalize, normalize
from svdengine.kernels.cuda.placed_predictor import PlacedPredictor
from svdengine.kernels.cuda.rope import place_keys
from svdengine.kernels.cuda.rounding import takes_integers
from svdengine.kernels.cuda.router import route
from svdengine.kernels.cuda.sampling import sample_tokens
from svdengine.kernels.cuda.single_row import multiply_and_activate, multiply_and_normalize, multiply_heads
from svdengine.kernels.cuda.sparse import sparse_ffn
from svdengine.kernels.cuda.state import State
from svdengine.kernels.executor import FfnPath

# Every neuron; those that are predicted active; or those whose gate is not exactly zero.
Keep = Callable[[int, Array], None]  # takes a layer's number and what its FFN reads
Sample = Literal["", "likeliest", "drawn"]  # which tokens are chosen from the logits, if any


@dataclass(frozen=True)
class Shape:
    """What the launches of a step depend on; everything else about a batch lies in device memory."""

    n: int  # rows
    wanted: int  # rows with logits
    tiles: int  # of rows that attend together
    tile_rows: int  # rows of a tile, at most
    ffn: FfnPath
    sample: Sample = ""


def run_step(state: State, predictor: PlacedPredictor, shape: Shape, keep: Keep | None = None) -> None:
    """Launch a step on the batch in the workspace. It leaves the logits of the wanted rows in work.logits.

    Where `shape.sample`, it leaves tokens that are chosen from them in work.chosen.
    """
    device, model, work = state.device, state.model, state.work
    embed_tokens(device, model, work, shape.n)
    following = [layer.attention_norm for layer in model.layers[1:]]
    normed = False  # whether the layer's first norm came with the sum that ended the layer before
    for index, layer in enumerate(model.layers):
        norm = following[index] if index < len(following) else None
        normed = run_layer(state, predictor, index, layer, shape, keep, norm, normed=normed)
    if shape.wanted:
        config, sizes = model.config, work.sizes
        normalize(
            device, config, work, model.output_norm, work.x, work.normed, sizes.hidden, shape.wanted,
            chosen=work.logit_rows, factor=config.logit_scale,
        )  # fmt: skip
        head(state, shape.wanted)
    if shape.sample:
        sample_tokens(device, work, shape.wanted, model.config.vocab_size, shape.sample == "drawn")


def head(state: State, wanted: int) -> None:
    """Logits of the first rows that are normed. A head of which the library needs copies is multiplied in slices."""
    device, work, matrix, copies = state.device, state.work, state.model.lm_head, state.copies
    count, hidden = matrix.rows, work.sizes.hidden
    read = rounded_rows(device, copies, [matrix], work.normed, work.rounded, hidden, wanted)
    if copies is not None and uses_library(copies, matrix, wanted) and kernels_of(matrix.format).library_type is None:
        count = slice_rows(matrix.rows, matrix.stride, len(copies.weights))
    for first in range(0, matrix.rows, count):
        part = matrix if count == matrix.rows else matrix.rows_from(first, min(count, matrix.rows - first))
        product(device, copies, part, work.normed, read, hidden, work.logits[first:], work.sizes.logits, wanted)


def run_layer(
    state: State,
    predictor: PlacedPredictor,
    index: int,
    layer: LayerWeights,
    shape: Shape,
    keep: Keep | None,
    following: Norm | None,
    *,
    normed: bool,
) -> bool:
    """One layer: x += attention(norm(x)); x += ffn(norm(x)); or both from the same x.

    `normed`: the first norm is done. `following`: that of the next layer, to which the last sum may go on; returns
    whether it did.
    """
    device, config, work, n = state.device, state.model.config, state.work, shape.n
    stride, x, blocks = work.sizes.hidden, work.normed, layer.blocks
    if blocks is not None and config.early_router:
        route(state, blocks, work.x, n)
    first, rounded = _first_is_rounded(state, layer, shape), _ffn_reads_rounded(state, layer, shape)
    if not normed:
        normalize(device, config, work, layer.attention_norm, work.x, x, stride, n, rounded=first)
    if config.parallel and layer.ffn_norm is not None:
        x = work.second
        normalize(device, config, work, layer.ffn_norm, work.x, x, stride, n, rounded=rounded)
    then = None if config.parallel or layer.ffn_norm is None else Following(layer.ffn_norm, x, rounded)
    done = attention(state, index, layer, shape, rounded=first, following=then)
    if then is not None and not done:
        normalize(device, config, work, then.norm, work.x, x, stride, n, rounded=rounded)
    if blocks is not None and not config.early_router:
        route(state, blocks, x, n)
    if keep is not None:
        keep(index, x)
    if layer.ffn_post_norm is None:
        then = None if following is None else Following(following, work.normed, first)
        return ffn(state, predictor, index, layer, x, n, shape.ffn, rounded=rounded, following=then)
    clear(device, work.second, config.hidden_size, stride, n)
    ffn(state, predictor, index, layer, x, n, shape.ffn, to=work.second, rounded=rounded)
    normalize(
        device, config, work, layer.ffn_post_norm, work.second, work.x, stride, n, factor=config.residual_scale,
        add=True,
    )  # fmt: skip
    return False


def attention(
    state: State,
    index: int,
    layer: LayerWeights,
    shape: Shape,
    *,
    rounded: bool = False,
    following: Following | None = None,
) -> bool:
    """x += attention of the normed rows.

    `rounded`: they lie in work.fine too. `following`: a norm of work.x that may be made in the same launch as the sum;
    returns whether it was.
    """
    device, model, work, n = state.device, state.model, state.work, shape.n
    config, sizes, copies = model.config, work.sizes, state.copies
    matrices = [part.matrix for part in layer.qkv]
    read = work.fine if rounded else rounded_rows(device, copies, matrices, work.normed, work.rounded, sizes.hidden, n)
    if n == 1 and len(layer.qkv) == 1 and not layer.joint_norms:
        multiply_heads(state, index, layer, read if takes_integers(matrices[0].format) else work.normed)
    else:
        for part in layer.qkv:
            to = work.qkv[part.offset :]
            product(device, copies, part.matrix, work.normed, read, sizes.hidden, to, sizes.qkv, n)
        if layer.joint_norms:
            normalize_joint(state, layer, n)
        place_keys(device, model, layer, index, work, state.cache, n)
    rounds = layer.attention_sub_norm is None and _rounds(state, [layer.o], n)
    done = attend(device, model, index, work, state.cache, n, shape.tiles, shape.tile_rows, rounded=rounds)
    if layer.attention_sub_norm is not None:
        normalize(
            device, config, work, layer.attention_sub_norm, work.attention, work.attention, sizes.attention, n,
            columns=config.head_count * config.head_dim,
        )  # fmt: skip
    post, factor = layer.attention_post_norm, config.residual_scale
    if done:
        read = work.rounded
    else:
        read = rounded_rows(device, copies, [layer.o], work.attention, work.rounded, sizes.attention, n)
    if n == 1 and post is None and following is not None:
        multiply_and_normalize(state, layer.o, read, following)
        return True
    product(
        device, copies, layer.o, work.attention, read, sizes.attention,
        work.x if post is None else work.second, sizes.hidden, n,
        factor=factor if post is None else 1.0, add=post is None,
    )  # fmt: skip
    if post is not None:
        normalize(device, config, work, post, work.second, work.x, sizes.hidden, n, factor=factor, add=True)
    return False


def normalize_joint(state: State, layer: LayerWeights, n: int) -> None:
    """The norms that all heads of q have together, and all of k, in work.qkv of n rows."""
    work, config, first = state.work, state.model.config, 0
    for norm, heads in zip(layer.joint_norms, (config.head_count, config.kv_head_count), strict=True):
        rows, columns = work.qkv[first:], heads * config.head_dim
        normalize(state.device, config, work, norm, rows, rows, work.sizes.qkv, n, columns=columns, centred=False)
        first += columns


def ffn(
    state: State,
    predictor: PlacedPredictor,
    index: int,
    layer: LayerWeights,
    x: Array,
    n: int,
    path: FfnPath,
    *,
    to: Array | None = None,
    rounded: bool = False,
    following: Following | None = None,
) -> bool:
    """to += FFN(x) of n rows; work.x, which takes it times the model's residual_scale, where `to` is not given.

    `rounded`: x lies in work.fine and work.coarse too. `following`: a norm of work.x that may be made in the same
    launch as the last sum; returns whether it was. In a mixture of experts the rows have been routed.
    """
    device, model, work = state.device, state.model, state.work
    sizes, factor = work.sizes, model.config.residual_scale if to is None else 1.0
    y, following = (work.x, following) if to is None else (to, None)
    if path != "dense":
        placed = predictor[index] if path == "predict" else None
        parts = sparse_ffn(device, model, work, index, placed, x, n, rounded=rounded)
        return _add_up(state, layer, parts, y, n, factor, following)
    if layer.blocks is not None:
        return dense_experts(state, layer, layer.blocks, x, n, rounded=rounded, following=following)
    read = activated(state, layer, x, n, rounded=rounded)
    if model.transposed_down:
        if n == 1 and following is not None and not layer.down.is_split:
            parts = multiply_transposed(device, layer.down, work.hidden, sizes.ffn, work.partial, n)
            return _add_up(state, layer, parts, y, n, factor, following)
        add_transposed_product(device, state.copies, layer.down, work.hidden, sizes.ffn, work.partial, y, n, factor)
        return False
    if n == 1 and following is not None and not layer.down.is_split:
        multiply_and_normalize(state, layer.down, read, following)
        return True
    product(
        device, state.copies, layer.down, work.hidden, read, sizes.ffn, y, sizes.hidden, n, factor=factor, add=True
    )  # fmt: skip
    return False


def activated(state: State, layer: LayerWeights, x: Array, n: int, *, rounded: bool) -> Array:
    """work.hidden = act(gate x) * (up x) of n rows, with the norm of what down reads; returns what `product` reads."""
    device, model, work, copies = state.device, state.model, state.work, state.copies
    config, sizes, sub_norm = model.config, work.sizes, layer.ffn_sub_norm
    matrices = [part.matrix for part in layer.gate_up]
    read = work.fine if rounded else rounded_rows(device, copies, matrices, x, work.rounded, sizes.hidden, n)
    of_down = not model.transposed_down and takes_rounded(layer.down, n)
    if n == 1 and sub_norm is None and not layer.up.is_split and len({m.format for m in matrices}) == 1:
        own = of_down and read is not work.rounded  # or else a block would write what others still read
        multiply_and_activate(state, layer, read if takes_integers(matrices[0].format) else x, rounded=own)
        if own:
            return work.rounded
    else:
        for part in layer.gate_up:
            product(device, copies, part.matrix, x, read, sizes.hidden, work.gate_up[part.offset :], sizes.gate_up, n)
        activate_ffn(device, config, work.gate_up, sizes.gate_up, work.hidden, sizes.ffn, n)
    if sub_norm is not None:
        normalize(device, config, work, sub_norm, work.hidden, work.hidden, sizes.ffn, n, columns=config.ffn_size)
    return rounded_rows(device, copies, [layer.down] if of_down else [], work.hidden, work.rounded, sizes.ffn, n)


def _add_up(
    state: State, layer: LayerWeights, parts: int, y: Array, n: int, factor: float, following: Following | None
) -> bool:
    """y += factor * (the parts in work.partial + down's bias), and the norm that follows; whether one did."""
    device, config, work = state.device, state.model.config, state.work
    if following is not None:
        add_parts_and_normalize(device, config, work, parts, layer.down.bias, n, following)
        return True
    add_parts(device, work.partial, parts, layer.down.bias, y, config.hidden_size, work.sizes.hidden, n, factor)
    return False


def _first_is_rounded(state: State, layer: LayerWeights, shape: Shape) -> bool:
    """Whether a layer's first norm leaves its rows rounded: where q, k or v read them so, or an FFN that shares it.

    Where two norms are made before either is read, the one of the FFN has the place.
    """
    if layer.ffn_norm is None and _ffn_reads_rounded(state, layer, shape):
        return True
    alone = not (state.model.config.parallel and layer.ffn_norm is not None)
    return alone and _rounds(state, [part.matrix for part in layer.qkv], shape.n)


def _ffn_reads_rounded(state: State, layer: LayerWeights, shape: Shape) -> bool:
    """Whether an FFN reads rounded rows: the predictor does, and matrices of some formats."""
    if layer.blocks is not None and shape.ffn == "dense":
        return reads_rounded(layer, shape.n)
    return shape.ffn == "predict" or _rounds(state, [part.matrix for part in layer.gate_up], shape.n)


def _rounds(state: State, matrices: list[Matrix], n: int) -> bool:
    """Whether products of n rows with some of the matrices, by own kernels, take them rounded."""
    return any(takes_rounded(matrix, n) for matrix in matrices if not uses_library(state.copies, matrix, n))
