"""The model as compiled code sees it: a NamedTuple of numbers and small arrays, one type for every model.

A matrix is a row of integers, its parts' addresses, format and sizes. Weights stay where they are (the file's mmap),
but for matrices that are interleaved in memory (panels.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Annotated, NamedTuple

import numpy as np
from numpy.typing import NDArray

from svdengine.kernels.cpu.matrix import (
    BIAS_VECTOR,
    BOUNDS,
    FORMAT,
    MATRIX_FIELDS,
    PANEL_CODES,
    check_codes,
    matrix_fields,
)
from svdengine.kernels.cpu.panels import interleaved
from svdengine.kernels.cpu.row_bounds import INTEGER_FORMATS, row_bounds
from svdengine.kernels.formats import FORMATS, STORED_DTYPES, Parts, WeightFormat, padded_columns, stored_parts
from svdengine.models import ModelConfig, TensorSpec, tensor_specs
from svdengine.models.tensors import ROUTER as ROUTER_NAME

# Matrices of a layer, or of an FFN block (from GATE to RESIDUAL), then those of the whole model after all blocks.
Q, K, V, O, GATE, UP, DOWN, FACTOR_A, FACTOR_B, RESIDUAL, ROUTER, LAYER_MATRICES = range(12)  # noqa: E741
EMBEDDING, LM_HEAD = range(2)

_NAMES = {"q": Q, "k": K, "v": V, "o": O, "gate": GATE, "up": UP, "down": DOWN, "down_T": DOWN, "router": ROUTER}

ACTIVATIONS = ("relu", "fatrelu", "drelu", "relu2", "silu", "gelu", "gelu_tanh")
RELU, FATRELU, DRELU, RELU2, SILU, GELU, GELU_TANH = range(7)
ROUTERS = ("softmax", "topk_softmax", "sigmoid")
SOFTMAX, TOPK_SOFTMAX, SIGMOID = range(3)


class Model(NamedTuple):
    """Everything about the weights that a step reads."""

    layers: int
    blocks: int  # FFNs of all layers: as many, or with experts more
    hidden: int
    hidden_stride: int  # floats in a row of the residual stream: hidden, padded
    heads: int
    kv_heads: int
    head_dim: int
    value_stride: int  # floats in a stored value vector: head_dim, padded to 16
    attention_stride: int  # floats in a row of attention output, padded
    ffn: int
    ffn_stride: int
    vocabulary: int
    activation: int
    threshold: float
    layer_norm: bool
    norm_eps: float
    gated: bool
    transposed_down: bool
    parallel: bool
    shared_norm: bool
    post_norms: bool
    sub_norms: bool
    qk_norm: bool  # of each head alone
    qk_norm_joint: bool
    learned_positions: bool
    rope: bool
    quantized: bool  # some matrix of a layer wants int8 activations
    head_quantized: bool  # the lm_head does
    embedding_scale: float
    residual_scale: float
    logit_scale: float
    attention_scale: float
    experts: int  # of a layer; 0: it has one FFN
    active_experts: int
    chosen_blocks: int  # with those that all rows have
    shared_gate: bool
    router: int
    router_columns: int  # its rows, padded
    early_router: bool
    expert_scale: float
    first_blocks: Annotated[NDArray[np.int64], 1]  # (layers + 1,) the first block of each layer, and of none
    matrices: Annotated[NDArray[np.int64], 2]  # (blocks * LAYER_MATRICES + 2, MATRIX_FIELDS)
    windows: Annotated[NDArray[np.int64], 1]  # (layers,) sliding window, or a number larger than any context
    attention_norm: Annotated[NDArray[np.float32], 3]  # (layers, 2, hidden_stride) weight and bias
    ffn_norm: Annotated[NDArray[np.float32], 3]  # (layers, 2, hidden_stride)
    attention_post_norm: Annotated[NDArray[np.float32], 3]  # (layers, 2, hidden_stride)
    ffn_post_norm: Annotated[NDArray[np.float32], 3]  # (layers, 2, hidden_stride)
    attention_sub_norm: Annotated[NDArray[np.float32], 3]  # (layers, 2, attention_stride)
    ffn_sub_norm: Annotated[NDArray[np.float32], 3]  # (layers, 2, ffn_stride)
    output_norm: Annotated[NDArray[np.float32], 2]  # (2, hidden_stride)
    head_norm: Annotated[NDArray[np.float32], 3]  # (layers, 2, head_dim) of q and k
    joint_norm: Annotated[NDArray[np.float32], 3]  # (layers, 2, attention_stride) of all heads of q and of k
    predictor_minus_threshold: Annotated[NDArray[np.float32], 2]  # (blocks, ffn_stride) where the sums of scores start
    predictor_unit: Annotated[NDArray[np.float32], 2]  # (blocks, ffn_stride)
    predictor_relu: Annotated[NDArray[np.int64], 1]  # (blocks,) whether there is a ReLU between the factors
    positions: Annotated[NDArray[np.float32], 2]  # (max_position or 1, hidden_stride)
    # (context, head_dim / 2), or twice as many where layers with a window have their own
    cos: Annotated[NDArray[np.float32], 2]
    sin: Annotated[NDArray[np.float32], 2]
    first_angles: Annotated[NDArray[np.int64], 1]  # (layers,) row of cos and sin for position 0; -1: not rotated


def build_model(
    config: ModelConfig,
    arrays: Mapping[str, NDArray],
    formats: Mapping[str, WeightFormat],
    rope_tables: tuple[NDArray[np.float32], NDArray[np.float32]],
    *,
    in_panels: Collection[str] = (),
    threads: int = 1,
    let_go: Callable[[str], None] | None = None,
) -> tuple[Model, list[NDArray], list[NDArray]]:
    """Lay a model out for compiled code. Returns it, the arrays that must outlive it, and those that are interleaved.

    `arrays` are stored parts by name, layers stacked; `formats` has the format of each matrix; those named by
    `in_panels` are copied, interleaved, with so many threads; `let_go` is told of each, whose own memory no one reads
    any more, or rows of an embedding's at most. Raises ValueError when an array's shape, type or layout
    is not what the config says: compiled code checks nothing.
    """
    keep: list[NDArray] = []
    panels: list[NDArray] = []
    specs = {spec.name: spec for spec in tensor_specs(config)}
    count = config.ffn_blocks * LAYER_MATRICES
    matrices = np.zeros((count + 2, MATRIX_FIELDS), np.int64)
    if formats.get(ROUTER_NAME, "f32") != "f32":
        raise ValueError(f"the router must be f32, found {formats[ROUTER_NAME]}")
    widest = max(config.ffn_size, config.vocab_size, config.hidden_size, config.expert_count, *_widths(config))
    zeros = np.zeros(widest + 64, np.float32)
    keep.append(zeros)

    def fields_of(name: str, side_by_side: bool) -> NDArray[np.int64]:
        parts = _checked_parts(specs[name], arrays, formats[name])
        rows, columns = specs[name].shape[-2:]
        if side_by_side:
            parts = interleaved(parts, formats[name], threads)
        (panels if side_by_side else keep).extend(parts.values())
        fields = matrix_fields(parts, formats[name], rows, columns, specs[name].shape[0] if specs[name].stacked else 1)
        if side_by_side:
            fields[:, FORMAT] = PANEL_CODES[formats[name]]
            if let_go is not None:
                let_go(name)
        return fields

    for name, kind in _NAMES.items():
        if name in specs:
            fields = fields_of(name, name in in_panels)
            if name == "down_T" and formats[name] in INTEGER_FORMATS:
                bounds = row_bounds(_checked_parts(specs[name], arrays, formats[name]))
                keep.append(bounds)
                fields[:, BOUNDS] = bounds.ctypes.data + np.arange(len(bounds)) * bounds.strides[0]
            bias = _bias_addresses(len(fields), name, arrays, zeros, keep)
            rows = np.arange(len(fields)) if name != ROUTER_NAME else np.array(config.expert_layers)
            matrices[rows * LAYER_MATRICES + kind, :BIAS_VECTOR] = fields
            matrices[rows * LAYER_MATRICES + kind, BIAS_VECTOR] = bias
    head = "embedding" if config.tied_embeddings else "lm_head"
    for slot, name in ((EMBEDDING, "embedding"), (LM_HEAD, head)):
        matrices[count + slot, :BIAS_VECTOR] = fields_of(name, slot == LM_HEAD and name in in_panels)[0]
        matrices[count + slot, BIAS_VECTOR] = zeros.ctypes.data
    check_codes(matrices)
    model = _model(config, specs, arrays, formats, matrices, formats[head], rope_tables)
    return model, [*keep, *panels], panels


def _widths(config: ModelConfig) -> tuple[int, int]:
    return config.head_count * config.head_dim, config.kv_head_count * config.head_dim


def _checked_parts(spec: TensorSpec, arrays: Mapping[str, NDArray], weight_format: WeightFormat) -> Parts:
    """The stored parts of a matrix, (layers, ...); an unstacked one is one layer."""
    layers = spec.shape[0] if spec.stacked else 1
    parts: Parts = {}
    for suffix, (shape, dtype) in stored_parts(weight_format, spec.shape[-2], spec.shape[-1]).items():
        array = arrays[spec.name + suffix]
        expected = (layers, *shape) if spec.stacked else shape
        if array.shape != expected or array.dtype != STORED_DTYPES[dtype] or not array.flags.c_contiguous:
            raise ValueError(f"{spec.name}{suffix}: found {array.dtype} {array.shape}, expected {dtype} {expected}")
        parts[suffix] = array.reshape(layers, *shape)
    return parts


def read_whole(config: ModelConfig, formats: Mapping[str, WeightFormat]) -> list[str]:
    """The matrices that can be interleaved: every step reads all of them, and their format has panels.

    An embedding that is the lm_head too is interleaved for that alone. Of experts a step reads few.
    """
    head = "embedding" if config.tied_embeddings else "lm_head"
    some = config.sparse_ffn or config.expert_count > 0
    names = ["q", "k", "v", "o", head, *([] if some else ["gate", "up", "down"])]
    return [name for name in names if formats.get(name) in PANEL_CODES]


def _bias_addresses(
    count: int, name: str, arrays: Mapping[str, NDArray], zeros: NDArray, keep: list[NDArray]
) -> NDArray[np.int64]:
    source = arrays.get(f"{'down' if name == 'down_T' else name}.bias")
    if source is None:
        return np.full(count, zeros.ctypes.data, np.int64)
    padded = _padded(source, 64)
    keep.append(padded)
    return padded.ctypes.data + np.arange(count) * padded.strides[0]


def _padded(array: NDArray, multiple: int, width: int = 0) -> NDArray[np.float32]:
    """A float32 copy whose last axis is filled with zeros to a multiple, and to at least `width`."""
    size = max(-(-array.shape[-1] // multiple) * multiple, width)
    out = np.zeros((*array.shape[:-1], size), np.float32)
    out[..., : array.shape[-1]] = array
    return out


def _model(
    config: ModelConfig,
    specs: Mapping[str, TensorSpec],
    arrays: Mapping[str, NDArray],
    formats: Mapping[str, WeightFormat],
    matrices: NDArray[np.int64],
    head_format: WeightFormat,
    rope_tables: tuple[NDArray[np.float32], NDArray[np.float32]],
) -> Model:
    d, hd = config.hidden_size, config.head_dim

    def norm(name: str, layers: int, width: int) -> NDArray[np.float32]:
        """Weight and bias, (layers, 2, padded width); zeros where the model has none."""
        out = np.zeros((layers, 2, width), np.float32)
        for row, part in enumerate((".weight", ".bias")):
            if name + part in specs:
                values = arrays[name + part].reshape(layers, -1)
                out[:, row, : values.shape[1]] = values
        return out

    head_norm = np.zeros((config.layer_count, 2, hd), np.float32)
    joint_norm = np.zeros((config.layer_count, 2, padded_columns(config.head_count * hd)), np.float32)
    if config.qk_norm:
        for row, name in enumerate(("q_norm.weight", "k_norm.weight")):
            into = joint_norm if config.qk_norm_joint else head_norm
            into[:, row, : arrays[name].shape[1]] = arrays[name]
    windows = np.full(config.layer_count, 1 << 40, np.int64)
    if config.sliding_window:
        windows[list(config.sliding_window_layers)] = config.sliding_window
    stride = padded_columns(d)
    positions = np.zeros((1, stride), np.float32)
    if config.learned_positions:
        positions = _padded(_float32(arrays["position_embedding"], formats["position_embedding"])[:, :d], 64)
    return Model(
        layers=config.layer_count,
        blocks=config.ffn_blocks,
        hidden=d,
        hidden_stride=stride,
        heads=config.head_count,
        kv_heads=config.kv_head_count,
        head_dim=hd,
        value_stride=-(-hd // 16) * 16,
        attention_stride=padded_columns(config.head_count * hd),
        ffn=config.ffn_size,
        ffn_stride=padded_columns(config.ffn_size),
        vocabulary=config.vocab_size,
        activation=ACTIVATIONS.index(config.activation),
        threshold=float(config.activation_threshold),
        layer_norm=config.norm == "layer",
        norm_eps=float(config.norm_eps),
        gated=config.gated,
        transposed_down=config.sparse_ffn,
        parallel=config.parallel,
        shared_norm=config.shared_norm,
        post_norms=config.post_norms,
        sub_norms=config.sub_norms,
        qk_norm=config.qk_norm and not config.qk_norm_joint,
        qk_norm_joint=config.qk_norm_joint,
        learned_positions=config.learned_positions,
        rope=config.rope is not None,
        quantized=any(FORMATS[formats[name]].activation_bits < 32 for name in _NAMES if name in specs),
        head_quantized=FORMATS[head_format].activation_bits < 32,
        embedding_scale=float(config.embedding_scale),
        residual_scale=float(config.residual_scale),
        logit_scale=float(config.logit_scale),
        attention_scale=config.attention_scale,
        experts=config.expert_count,
        active_experts=config.active_experts,
        chosen_blocks=config.chosen_blocks,
        shared_gate=config.shared_gate,
        router=ROUTERS.index(config.router),
        router_columns=padded_columns(config.router_rows),
        early_router=config.early_router,
        expert_scale=float(config.expert_scale),
        first_blocks=np.array([config.blocks_of(i).start for i in range(config.layer_count + 1)], np.int64),
        matrices=matrices,
        windows=windows,
        attention_norm=norm("attention_norm", config.layer_count, stride),
        ffn_norm=norm("ffn_norm", config.layer_count, stride),
        attention_post_norm=norm("attention_post_norm", config.layer_count, stride),
        ffn_post_norm=norm("ffn_post_norm", config.layer_count, stride),
        attention_sub_norm=norm("attention_sub_norm", config.layer_count, padded_columns(config.head_count * hd)),
        ffn_sub_norm=norm("ffn_sub_norm", config.layer_count, padded_columns(config.ffn_size)),
        output_norm=norm("output_norm", 1, stride)[0],
        head_norm=head_norm,
        joint_norm=joint_norm,
        predictor_minus_threshold=np.zeros((config.ffn_blocks, padded_columns(config.ffn_size)), np.float32),
        predictor_unit=np.zeros((config.ffn_blocks, padded_columns(config.ffn_size)), np.float32),
        predictor_relu=np.zeros(config.ffn_blocks, np.int64),
        positions=positions,
        cos=rope_tables[0],
        sin=rope_tables[1],
        first_angles=_first_angles(config, len(rope_tables[0])),
    )


def _first_angles(config: ModelConfig, rows: int) -> NDArray[np.int64]:
    """Where each layer's angles begin in tables of `rows`: those of the local rope are their second half."""
    first = np.zeros(config.layer_count, np.int64)
    if config.local_rope is not None:
        first[list(config.sliding_window_layers)] = rows // 2
    first[list(config.unrotated_layers)] = -1
    return first


def _float32(array: NDArray, weight_format: WeightFormat) -> NDArray[np.float32]:
    if weight_format not in ("f32", "f16"):
        raise ValueError(f"position_embedding must be f32 or f16, found {weight_format}")
    return array.astype(np.float32)
