"""One step of the model, from tokens to logits, as operators on a device's stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from svdengine.kernels.ascend import substitutes
from svdengine.kernels.ascend.attention import Attending, LayerAttention
from svdengine.kernels.ascend.device import AscendDevice
from svdengine.kernels.ascend.kv_cache import KvCache
from svdengine.kernels.ascend.model import LayerWeights, Model, Norm
from svdengine.kernels.ascend.operators import (
    activate,
    add,
    add_and_normalize,
    gather,
    look_up,
    multiply,
    normalize,
    project,
    project_all,
    put,
    relu_in_place,
    rms_norm,
    rotate,
    scale,
)
from svdengine.kernels.ascend.sparse import PlacedPredictor, SparseState, sparse_ffn
from svdengine.kernels.ascend.tensor import Tensor
from svdengine.kernels.ascend.workspace import Workspace
from svdengine.kernels.executor import FfnPath

Keep = Callable[[int, Tensor], None]  # takes a layer's number and what its FFN reads


@dataclass(frozen=True)
class Shape:
    """What the operators of a step depend on, but for those of attention; all else lies in device memory."""

    n: int  # rows
    wanted: int  # rows with logits
    ffn: FfnPath


@dataclass
class Current:
    """What is the step's own and not in device memory."""

    attending: Attending
    slots: tuple[int, ...]  # where a row's key and value go


@dataclass(frozen=True)
class State:
    """What a step works with."""

    device: AscendDevice
    model: Model
    work: Workspace
    cache: KvCache
    current: Current
    fused: bool  # whether the fused attention operator can be used
    sparse: SparseState | None  # None: no kernels, FFNs run dense


def run_step(state: State, predictor: PlacedPredictor | None, shape: Shape, keep: Keep | None = None) -> None:
    """Start a step on the batch in the workspace. It leaves the logits of the wanted rows in work.logits."""
    device, model, work = state.device, state.model, state.work
    x = _embed(state, shape.n)
    added = None  # what the residual stream lacks still: the sum is made with the norm that comes next
    for index, layer in enumerate(model.layers):
        x, added = _run_layer(state, predictor, index, layer, shape, x, added, keep)
    if shape.wanted and added is not None:
        add(device, x, added, model.config.residual_scale)
        wanted, normed = work.wanted.rows(0, shape.wanted), work.normed.rows(0, shape.wanted)
        gather(device, x, work.inputs.logit_rows.leading(shape.wanted), wanted)
        normalize(device, model.config, model.output_norm, wanted, work.inverse, normed)
        multiply(device, model.lm_head, normed, work.logits.rows(0, shape.wanted))


def run_ffn(
    state: State, predictor: PlacedPredictor | None, index: int, layer: LayerWeights, x: Tensor, path: FfnPath
) -> Tensor:
    """The FFN of rows x (n, hidden), in work.added."""
    device, config, work, n = state.device, state.model.config, state.work, x.shape[0]
    added = work.added.rows(0, n)
    if path != "dense" and state.sparse is not None and layer.sparse is not None:
        predicting = predictor if path == "predict" else None
        bias = work.inputs.sparsity_bias
        sparse_ffn(device, config, state.sparse, layer.sparse, predicting, index, x, bias, added)
    else:
        _dense_ffn(state, layer, x, added)
    return added


def _embed(state: State, n: int) -> Tensor:
    """The residual stream (n, hidden) of the tokens; rope's angles of their positions are looked up too."""
    device, model, work = state.device, state.model, state.work
    x, positions = work.x[0].rows(0, n), work.inputs.positions.leading(n)
    look_up(device, model.embedding, work.inputs.tokens.leading(n), x)
    scale(device, x, model.config.embedding_scale)
    if model.positions is not None:
        look_up(device, model.positions, positions, work.added.rows(0, n))
        add(device, x, work.added.rows(0, n))
    if model.cos is not None and model.sin is not None:
        look_up(device, model.cos, positions, work.cos.rows(0, n))
        look_up(device, model.sin, positions, work.sin.rows(0, n))
    return x


def _run_layer(
    state: State,
    predictor: PlacedPredictor | None,
    index: int,
    layer: LayerWeights,
    shape: Shape,
    x: Tensor,
    added: Tensor | None,
    keep: Keep | None,
) -> tuple[Tensor, Tensor]:
    """One layer, from the residual stream x, to which `added` is still to be added, to the next such pair.

    x += attention(norm(x)); x += ffn(norm(x)); or both from the same x.
    """
    device, config, work, n = state.device, state.model.config, state.work, shape.n
    normed = work.normed.rows(0, n)
    x = _normalize_sum(state, layer.attention_norm, x, added, normed)
    read = normed
    if config.parallel and layer.ffn_norm is not None:
        read = work.second.rows(0, n)
        normalize(device, config, layer.ffn_norm, x, work.inverse, read)
    attended = _attention(state, index, layer, normed)
    if config.parallel or layer.ffn_norm is None:
        add(device, x, attended, config.residual_scale)
    else:
        x = _normalize_sum(state, layer.ffn_norm, x, attended, read)
    if keep is not None:
        keep(index, read)
    return x, run_ffn(state, predictor, index, layer, read, shape.ffn)


def _normalize_sum(state: State, norm: Norm, x: Tensor, added: Tensor | None, y: Tensor) -> Tensor:
    """y = the norm of the residual stream, after what is still to be added to it; returns the stream."""
    device, config, work = state.device, state.model.config, state.work
    if added is None:
        normalize(device, config, norm, x, work.inverse, y)
        return x
    other = next(buffer for buffer in work.x if buffer.address != x.address).rows(0, x.shape[0])
    return add_and_normalize(device, config, norm, x, added, work.inverse, y, other)


def _attention(state: State, index: int, layer: LayerWeights, x: Tensor) -> Tensor:
    """Attention of the normed rows x, whose keys and values are cached first, (n, hidden) in work.added."""
    device, config, work, n = state.device, state.model.config, state.work, x.shape[0]
    q, k, v = project_all(device, layer.qkv, x, work.qkv)
    q = _turn(state, layer.q_norm, config.head_count, q, work.turned_q.rows(0, n))
    k = _turn(state, layer.k_norm, config.kv_head_count, k, work.turned_k.rows(0, n))

    keys, values = state.cache.keys[index], state.cache.values[index]
    for rows, cached in ((k, keys), (v, values)):
        _keep_rows(state, rows, cached.reshape(cached.shape[0] * work.block_size, rows.shape[1]))
    attention = LayerAttention(
        device, config, work, q, keys, values, window=layer.window, fused=state.fused, keep=device.repeat
    )
    device.vary(lambda: attention.attend(state.current.attending))
    out = work.added.rows(0, n)
    project(device, layer.o, work.attended.rows(0, n), out)
    return out


def _keep_rows(state: State, rows: Tensor, cached: Tensor) -> None:
    """Copy keys or values (n, kv heads * head_dim) to their slots of a layer's pool, which has one a row."""
    device, n = state.device, rows.shape[0]
    if device.soc.has("aclnnInplaceIndexCopy"):
        put(device, rows, state.work.inputs.slots.leading(n), cached)
    else:
        device.vary(lambda: substitutes.put(device, rows, state.current.slots, cached))


def _turn(state: State, norm: Norm | None, heads: int, x: Tensor, other: Tensor) -> Tensor:
    """The rows x (n, heads * head_dim) after their norm and rope, in x or in `other`."""
    device, config, work, n = state.device, state.model.config, state.work, x.shape[0]
    if norm is not None:
        by_head = n * heads, config.head_dim
        rms_norm(device, norm, config.norm_eps, x.reshape(*by_head), work.inverse, other.reshape(*by_head))
        x, other = other, x
    if config.rope is not None:
        rotate(device, x, heads, work.cos.rows(0, n), work.sin.rows(0, n), state.model.turn, other)
        x = other
    return x


def _dense_ffn(state: State, layer: LayerWeights, x: Tensor, out: Tensor) -> None:
    """out (n, hidden) = the FFN of rows x, every neuron."""
    device, config, work, n = state.device, state.model.config, state.work, x.shape[0]
    hidden = work.hidden.rows(0, n)
    first, *up = project_all(device, layer.gate_up, x, work.gate_up)
    activate(device, config.activation, config.activation_threshold, first, hidden)
    for factor in up:
        if config.activation == "drelu":
            relu_in_place(device, factor)
        device.run("aclnnInplaceMul", hidden, factor)
    project(device, layer.down, hidden, out, turned=config.sparse_ffn)
