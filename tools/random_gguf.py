"""Write given weights as a GGUF file of the llama architecture, with a tokenizer that is just enough to be loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svdengine.converters.gguf_file import import_gguf
from svdengine.models import ModelConfig, TensorSpec, tensor_specs
from svdengine.models.naming import GGUF_STEMS

GGUF_TYPES = ("q8_0", "q4_0")

Tensor = Callable[[str, int], NDArray[np.float32]]  # (canonical name, layer) -> one layer of it

_BLOCK = 32  # columns that share a scale in Q8_0 and Q4_0
_BYTES = {"q8_0": 34, "q4_0": 18, "f32": 4 * _BLOCK}  # of a block
_CHUNK = 1 << 22  # elements that are quantised at once
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # token types
_FIRST_TOKENS = 3 + 256


def write_gguf(path: Path, config: ModelConfig, kind: str, tensor: Tensor) -> None:
    """Write a Llama model whose matrices are stored as `kind`, q8_0 or q4_0; embeddings are q8_0 in either case.

    Memory is bounded by the largest tensor. Raises ConversionError when the gguf package is missing, ValueError for
    a config that llama.cpp's llama architecture does not have.
    """
    gguf = import_gguf()
    _check(config)
    partial = path.with_name(path.name + ".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    try:
        _add_settings(writer, config)
        _add_tokenizer(writer, config.vocab_size)
        for name, layer, spec in _tensors(config):
            _declare(gguf, writer, _gguf_name(name, layer), spec, _kind_of(spec, kind))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, layer, spec in _tensors(config):
            rows = _in_gguf_order(config, name, tensor(name, layer))
            writer.write_tensor_data(_quantize(gguf, rows, _kind_of(spec, kind)))
        writer.close()
        partial.replace(path)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)


def _tensors(config: ModelConfig) -> Iterator[tuple[str, int, TensorSpec]]:
    for spec in tensor_specs(config):
        for layer in range(spec.shape[0] if spec.stacked else 1):
            yield spec.name, layer, spec


def _declare(gguf: Any, writer: Any, name: str, spec: TensorSpec, kind: str) -> None:
    shape = _stored_shape(spec.shape[1:] if spec.stacked else spec.shape, kind)
    dtype = np.dtype(np.float32 if kind == "f32" else np.uint8)
    nbytes = math.prod(shape) * dtype.itemsize
    writer.add_tensor_info(name, shape, dtype, nbytes, raw_dtype=_type(gguf, kind))


def _check(config: ModelConfig) -> None:
    if config.family != "llama" or config.activation != "silu" or not config.gated or config.norm != "rms":
        raise ValueError(f"llama.cpp has no {config.family} model whose activation is {config.activation}; use silu")
    if config.hidden_size % _BLOCK or config.ffn_size % _BLOCK or config.vocab_size < _FIRST_TOKENS:
        raise ValueError(f"GGUF needs sizes that are multiples of {_BLOCK} and at least {_FIRST_TOKENS} tokens")


def _add_settings(writer: Any, config: ModelConfig) -> None:
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


def _gguf_name(name: str, layer: int) -> str:
    return GGUF_STEMS[name.removesuffix(".weight")][0].format(layer=layer) + ".weight"


def _type(gguf: Any, kind: str) -> Any:
    return gguf.GGMLQuantizationType[kind.upper()]


def _stored_shape(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    """Of the array that holds the tensor: bytes along the last axis where it is quantised."""
    return shape if kind == "f32" else (*shape[:-1], shape[-1] // _BLOCK * _BYTES[kind])


def _in_gguf_order(config: ModelConfig, name: str, w: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of q and k so that the two dimensions which rope rotates together are neighbours."""
    if name not in ("q", "k"):
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
