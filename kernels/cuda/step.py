"""One step of the model, from tokens to logits and the tokens chosen from them, as launches on a device's stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from svdengine.kernels.cuda.attention import attend
from svdengine.kernels.cuda.device import Array, Device
from svdengine.kernels.cuda.elementwise import activate_ffn, add_parts, clear
from svdengine.kernels.cuda.embedding import embed_tokens
from svdengine.kernels.cuda.gemm import HalfCopies, add_transposed_product, product, rounded_rows
from svdengine.kernels.cuda.kv_cache import KvCache
from svdengine.kernels.cuda.model import LayerWeights, Model, PlacedPredictor
from svdengine.kernels.cuda.norm import normalize
from svdengine.kernels.cuda.rope import place_keys
from svdengine.kernels.cuda.sampling import sample_tokens
from svdengine.kernels.cuda.sparse import sparse_ffn
from svdengine.kernels.cuda.workspace import Workspace
from svdengine.kernels.executor import FfnPath

# Every neuron; those that are predicted active; or those whose gate is not exactly zero.
Keep = Callable[[int, Array], None]  # takes a layer's number and what its FFN reads


@dataclass(frozen=True)
class Shape:
    """What the launches of a step depend on; everything else about a batch lies in device memory."""

    n: int  # rows
    wanted: int  # rows with logits
    tiles: int  # of rows that attend together
    tile_rows: int  # rows of a tile, at most
    ffn: FfnPath
    sample: bool = False  # whether tokens are chosen from the logits


@dataclass(frozen=True)
class State:
    """What a step works with."""

    device: Device
    model: Model
    work: Workspace
    cache: KvCache
    copies: HalfCopies | None  # room for the library's operands, where there is a library


def run_step(state: State, predictor: PlacedPredictor, shape: Shape, keep: Keep | None = None) -> None:
    """Launch a step on the batch in the workspace. It leaves the logits of the wanted rows in work.logits.

    Where `shape.sample`, it leaves tokens that are chosen from them in work.chosen.
    """
    device, model, work = state.device, state.model, state.work
    embed_tokens(device, model, work, shape.n)
    for index, layer in enumerate(model.layers):
        run_layer(state, predictor, index, layer, shape, keep)
    if shape.wanted:
        config, sizes = model.config, work.sizes
        normalize(
            device, config, model.output_norm, work.x, work.normed, sizes.hidden, shape.wanted,
            chosen=work.logit_rows, factor=config.logit_scale,
        )  # fmt: skip
        rounded = rounded_rows(
            device, state.copies, [model.lm_head], work.normed, work.rounded, sizes.hidden, shape.wanted
        )
        product(
            device, state.copies, model.lm_head, work.normed, rounded, sizes.hidden, work.logits, sizes.logits,
            shape.wanted,
        )  # fmt: skip
    if shape.sample:
        sample_tokens(device, work, shape.wanted, model.config.vocab_size)


def run_layer(
    state: State, predictor: PlacedPredictor, index: int, layer: LayerWeights, shape: Shape, keep: Keep | None
) -> None:
    """One layer: x += attention(norm(x)); x += ffn(norm(x)); or both from the same x."""
    device, config, work, n = state.device, state.model.config, state.work, shape.n
    stride, normed = work.sizes.hidden, work.normed
    normalize(device, config, layer.attention_norm, work.x, normed, stride, n)
    if config.parallel and layer.ffn_norm is not None:
        normed = work.second
        normalize(device, config, layer.ffn_norm, work.x, normed, stride, n)
    attention(state, index, layer, shape)
    if not config.parallel and layer.ffn_norm is not None:
        normalize(device, config, layer.ffn_norm, work.x, normed, stride, n)
    if keep is not None:
        keep(index, normed)
    if layer.ffn_post_norm is None:
        ffn(state, predictor, index, layer, normed, n, shape.ffn)
        return
    clear(device, work.second, config.hidden_size, stride, n)
    ffn(state, predictor, index, layer, normed, n, shape.ffn, to=work.second)
    normalize(
        device, config, layer.ffn_post_norm, work.second, work.x, stride, n, factor=config.residual_scale, add=True
    )


def attention(state: State, index: int, layer: LayerWeights, shape: Shape) -> None:
    """x += attention of the normed rows."""
    device, model, work, n = state.device, state.model, state.work, shape.n
    sizes = work.sizes
    copies, matrices = state.copies, [part.matrix for part in layer.qkv]
    rounded = rounded_rows(device, copies, matrices, work.normed, work.rounded, sizes.hidden, n)
    for part in layer.qkv:
        to = work.qkv[part.offset :]
        product(device, copies, part.matrix, work.normed, rounded, sizes.hidden, to, sizes.qkv, n)
    place_keys(device, model, layer, index, work, state.cache, n)
    attend(device, model, index, work, state.cache, n, shape.tiles, shape.tile_rows)
    config = model.config
    if layer.attention_sub_norm is not None:
        normalize(
            device, config, layer.attention_sub_norm, work.attention, work.attention, sizes.attention, n,
            columns=config.head_count * config.head_dim,
        )  # fmt: skip
    post, factor = layer.attention_post_norm, config.residual_scale
    rounded = rounded_rows(device, copies, [layer.o], work.attention, work.rounded, sizes.attention, n)
    product(
        device, copies, layer.o, work.attention, rounded, sizes.attention,
        work.x if post is None else work.second, sizes.hidden, n,
        factor=factor if post is None else 1.0, add=post is None,
    )  # fmt: skip
    if post is not None:
        normalize(device, config, post, work.second, work.x, sizes.hidden, n, factor=factor, add=True)


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
) -> None:
    """to += FFN(x) of n rows; work.x, which takes it times the model's residual_scale, where `to` is not given."""
    device, model, work = state.device, state.model, state.work
    config, sizes, factor = model.config, work.sizes, model.config.residual_scale if to is None else 1.0
    y = work.x if to is None else to
    if path != "dense":
        parts = sparse_ffn(device, model, work, index, predictor[index] if path == "predict" else None, x, n)
        add_parts(device, work.partial, parts, layer.down.bias, y, config.hidden_size, sizes.hidden, n, factor)
        return
    copies, matrices = state.copies, [part.matrix for part in layer.gate_up]
    rounded = rounded_rows(device, copies, matrices, x, work.rounded, sizes.hidden, n)
    for part in layer.gate_up:
        product(device, copies, part.matrix, x, rounded, sizes.hidden, work.gate_up[part.offset :], sizes.gate_up, n)
    activate_ffn(device, config, work.gate_up, sizes.gate_up, work.hidden, sizes.ffn, n)
    if layer.ffn_sub_norm is not None:
        sub_norm, hidden = layer.ffn_sub_norm, work.hidden
        normalize(device, config, sub_norm, hidden, hidden, sizes.ffn, n, columns=config.ffn_size)
    if model.transposed_down:
        add_transposed_product(device, state.copies, layer.down, work.hidden, sizes.ffn, work.partial, y, n, factor)
    else:
        rounded = rounded_rows(device, copies, [layer.down], work.hidden, work.rounded, sizes.ffn, n)
        product(
            device, copies, layer.down, work.hidden, rounded, sizes.ffn, y, sizes.hidden, n, factor=factor, add=True
        )
