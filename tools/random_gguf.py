"""Write given weights as a GGUF file, with a tokenizer that is just enough to be loaded.

Llama, and two mixtures of experts: Mixtral, which is llama's architecture too, and SmallThinker, with ReLU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svdengine.converters.gguf_file import import_gguf
from svdengine.models import FAMILIES, ModelConfig, TensorSpec, tensor_specs
from svdengine.models.tensors import FFN_MATRICES

GGUF_TYPES = ("q8_0", "q4_0")

_ARCHITECTURES = {"llama": "llama", "mixtral": "llama", "smallthinker": "smallthinker"}
_GATING = {"topk_softmax": "SOFTMAX", "sigmoid": "SIGMOID"}  # of those that SmallThinker has

Tensor = Callable[[str, int], NDArray[np.float32]]  # (canonical name, layer) -> one layer of it

_BLOCK = 32  # columns that share a scale in Q8_0 and Q4_0
_BYTES = {"q8_0": 34, "q4_0": 18, "f32": 4 * _BLOCK}  # of a block
_CHUNK = 1 << 22  # elements that are quantised at once
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # token types
_FIRST_TOKENS = 3 + 256


@dataclass(frozen=True)
class _Stored:
    """One tensor of the file, and what it is made of: of experts, all those of a layer."""

    name: str
    shape: tuple[int, ...]
    kind: str  # q8_0, q4_0 or f32
    source: str  # canonical name
    indices: tuple[int, ...]  # in the stack of that name


def write_gguf(path: Path, config: ModelConfig, kind: str, tensor: Tensor) -> None:
    """Write a model whose matrices are stored as `kind`, q8_0 or q4_0; embeddings are q8_0 in either case.

    Memory is bounded by the largest tensor. Raises ConversionError when the gguf package is missing, ValueError for
    a config that llama.cpp does not have (`check_gguf`).
    """
    gguf = import_gguf()
    check_gguf(config)
    partial = path.with_name(path.name + ".partial")
    writer = gguf.GGUFWriter(partial, _ARCHITECTURES[config.family])
    stored = _tensors(config, kind)
    try:
        _add_settings(gguf, writer, config)
        _add_tokenizer(writer, config.vocab_size)
        for one in stored:
            _declare(gguf, writer, one)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for one in stored:
            writer.write_tensor_data(_data(gguf, config, one, tensor))
        writer.close()
        partial.replace(path)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)


def check_gguf(config: ModelConfig) -> None:
    """Raise ValueError for a config that llama.cpp has no graph for, or whose sizes GGUF cannot store."""
    wanted = "relu" if config.family == "smallthinker" else "silu"
    if config.family not in _ARCHITECTURES or not config.gated or config.norm != "rms" or config.dense_layers:
        raise ValueError(
            f"no GGUF can be written of this {config.family} model; give one of {', '.join(_ARCHITECTURES)}"
        )
    if config.activation != wanted:
        found = f"llama.cpp has no {config.family} model whose activation is {config.activation}"
        raise ValueError(f"{found}; use {wanted}")
    if config.hidden_size % _BLOCK or config.ffn_size % _BLOCK or config.vocab_size < _FIRST_TOKENS:
        raise ValueError(f"GGUF needs sizes that are multiples of {_BLOCK} and at least {_FIRST_TOKENS} tokens")


def _tensors(config: ModelConfig, kind: str) -> list[_Stored]:
    stored: list[_Stored] = []
    for spec in tensor_specs(config):
        shape, count = (spec.shape[1:], spec.shape[0]) if spec.stacked else (spec.shape, 1)
        if spec.name == "down_T":
            shape = shape[::-1]
        blocks = config.expert_count if spec.name in FFN_MATRICES and config.expert_count else 1
        for layer in range(count // blocks):
            name = _gguf_name(spec.name, layer, experts=blocks > 1)
            of = _kind_of(spec, kind)
            indices = tuple(range(layer * blocks, (layer + 1) * blocks))
            stored.append(_Stored(name, (blocks, *shape) if blocks > 1 else shape, of, spec.name, indices))
    return stored


def _declare(gguf: Any, writer: Any, one: _Stored) -> None:
    shape = _stored_shape(one.shape, one.kind)
    dtype = np.dtype(np.float32 if one.kind == "f32" else np.uint8)
    nbytes = math.prod(shape) * dtype.itemsize
    writer.add_tensor_info(one.name, shape, dtype, nbytes, raw_dtype=_type(gguf, one.kind))


def _data(gguf: Any, config: ModelConfig, one: _Stored, tensor: Tensor) -> NDArray[Any]:
    """The bytes of one tensor, float32 where it is not quantised."""
    parts = (_in_gguf_order(config, one.source, tensor(one.source, index)) for index in one.indices)
    if len(one.indices) == 1:
        return _quantize(gguf, next(parts), one.kind)
    out = np.empty(_stored_shape(one.shape, one.kind), np.float32 if one.kind == "f32" else np.uint8)
    for index, rows in enumerate(parts):
        out[index] = _quantize(gguf, rows, one.kind)
    return out


def _add_settings(gguf: Any, writer: Any, config: ModelConfig) -> None:
    assert config.rope is not None
    writer.add_name("random weights")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.layer_count)
    writer.add_feed_forward_length(config.ffn_size)
    writer.add_head_count(config.head_count)
    writer.add_head_count_kv(config.kv_head_count)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    if config.expert_count:
        writer.add_expert_count(config.expert_count)
        writer.add_expert_used_count(config.active_experts)
        writer.add_expert_feed_forward_length(config.ffn_size)
    if config.family == "smallthinker":
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType[_GATING[config.router]])
        if config.sliding_window:
            writer.add_sliding_window(config.sliding_window)


def _add_tokenizer(writer: Any, size: int) -> None:
    """The three control tokens and the 256 bytes, which any text falls back to; the rest are never produced."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [_UNKNOWN, _CONTROL, _CONTROL, *[_BYTE] * 256]
    rest = size - len(tokens)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*tokens, *(f"\u2581token{i}" for i in range(rest))])
    writer.add_token_scores([0.0] * len(tokens) + [-1.0 - i for i in range(rest)])
    writer.add_token_types([*kinds, *[_NORMAL] * rest])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def _kind_of(spec: TensorSpec, kind: str) -> str:
    if not spec.matrix:
        return "f32"
    return "q8_0" if spec.name in ("embedding", "lm_head") else kind


def _gguf_name(name: str, layer: int, *, experts: bool) -> str:
    stem = name.removesuffix(".weight").removesuffix("_T")
    family = FAMILIES["mixtral"].gguf
    assert family is not None
    return family.naming.stems[f"expert_{stem}" if experts else stem][0].format(layer=layer) + ".weight"


def _type(gguf: Any, kind: str) -> Any:
    return gguf.GGMLQuantizationType[kind.upper()]


def _stored_shape(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    """Of the array that holds the tensor: bytes along the last axis where it is quantised."""
    return shape if kind == "f32" else (*shape[:-1], shape[-1] // _BLOCK * _BYTES[kind])


def _in_gguf_order(config: ModelConfig, name: str, w: NDArray[np.float32]) -> NDArray[np.float32]:
    """One row an output; those of q and k so that, in llama, dimensions which rope rotates together are neighbours."""
    if name == "down_T":
        return np.ascontiguousarray(w.T)
    if name not in ("q", "k") or config.family == "smallthinker":
        return w
    heads = config.head_count if name == "q" else config.kv_head_count
    return w.reshape(heads, 2, -1, w.shape[-1]).swapaxes(1, 2).reshape(w.shape)


def _quantize(gguf: Any, w: NDArray[np.float32], kind: str) -> NDArray[Any]:
    if kind == "f32":
        return w
    out = np.empty(_stored_shape(w.shape, kind), np.uint8)
    step = max(1, _CHUNK // w.shape[-1])
    for row in range(0, len(w), step):
        out[row : row + step] = gguf.quants.quantize(w[row : row + step], _type(gguf, kind))
    return out
