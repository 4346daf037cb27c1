"""One step of the model, from tokens to logits and the tokens chosen from them, as launches on a device's stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from svdengine.kernels.cuda.attention import attend
from svdengine.kernels.cuda.device import Array, Device
from svdengine.kernels.cuda.elementwise import activate_ffn, add_parts
from svdengine.kernels.cuda.embedding import embed_tokens
from svdengine.kernels.cuda.gemm import HalfCopies, add_transposed_product, product
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
        product(
            device, state.copies, model.lm_head, work.normed, sizes.hidden, work.logits, sizes.logits, shape.wanted
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
    ffn(state, predictor, index, layer, normed, n, shape.ffn)


def attention(state: State, index: int, layer: LayerWeights, shape: Shape) -> None:
    """x += attention of the normed rows."""
    device, model, work, n = state.device, state.model, state.work, shape.n
    sizes = work.sizes
    for part in layer.qkv:
        product(device, state.copies, part.matrix, work.normed, sizes.hidden, work.qkv[part.offset :], sizes.qkv, n)
    place_keys(device, model, layer, index, work, state.cache, n)
    attend(device, model, index, work, state.cache, n, shape.tiles, shape.tile_rows)
    product(
        device, state.copies, layer.o, work.attention, sizes.attention, work.x, sizes.hidden, n,
        factor=model.config.residual_scale, add=True,
    )  # fmt: skip


def ffn(
    state: State, predictor: PlacedPredictor, index: int, layer: LayerWeights, x: Array, n: int, path: FfnPath
) -> None:
    """work.x += FFN(x) of n rows."""
    device, model, work = state.device, state.model, state.work
    config, sizes, factor = model.config, work.sizes, model.config.residual_scale
    if path != "dense":
        parts = sparse_ffn(device, model, work, index, predictor[index] if path == "predict" else None, x, n)
        add_parts(device, work.partial, parts, layer.down.bias, work.x, config.hidden_size, sizes.hidden, n, factor)
        return
    for part in layer.gate_up:
        product(device, state.copies, part.matrix, x, sizes.hidden, work.gate_up[part.offset :], sizes.gate_up, n)
    activate_ffn(device, config, work.gate_up, sizes.gate_up, work.hidden, sizes.ffn, n)
    if model.transposed_down:
        add_transposed_product(
            device, state.copies, layer.down, work.hidden, sizes.ffn, work.partial, work.x, n, factor
        )
    else:
        product(
            device, state.copies, layer.down, work.hidden, sizes.ffn, work.x, sizes.hidden, n, factor=factor, add=True
        )
