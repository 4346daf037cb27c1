"""Small models of every kind, with random weights, and batches to run them: shared by the tests of all executors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svdengine.kernels.batch import BLOCK_SIZE, Batch
from svdengine.kernels.formats import WeightFormat, dequantize, quantize
from svdengine.models.config import ModelConfig, Rope
from svdengine.models.family import Source
from svdengine.models.tensors import tensor_specs

# Sizes are odd on purpose: no multiple of 64 columns or of 16 rows, grouped heads, a head_dim that is not a power of 2.
_LLAMA = ModelConfig(
    family="llama",
    vocab_size=119,
    hidden_size=90,
    layer_count=2,
    head_count=9,
    kv_head_count=3,
    head_dim=10,
    ffn_size=150,
    max_position=128,
    norm="rms",
    norm_eps=1e-5,
    activation="silu",
    gated=True,
    rope=Rope(theta=10000.0),
)


def zoo() -> dict[str, ModelConfig]:
    """Small configs by name; together they use every field of ModelConfig."""
    llama, layered = _LLAMA, replace(_LLAMA, norm="layer", gated=False)
    opt = replace(layered, family="opt", activation="relu", rope=None, learned_positions=True, kv_head_count=9)
    opt = replace(opt, qkv_bias=True, output_bias=True, ffn_bias=True, tied_embeddings=True)
    falcon = replace(layered, family="falcon", activation="gelu", parallel=True, tied_embeddings=True)
    biases = {"qkv_bias": True, "output_bias": True, "ffn_bias": True}
    yarn = Rope(10000.0, "yarn", factor=4.0, original_max_position=32, attention_factor=1.14)
    return {
        "llama": llama,
        "llama_one_layer": replace(llama, layer_count=1, vocab_size=128, hidden_size=128, ffn_size=256),
        "llama_relu_tied": replace(llama, activation="relu", tied_embeddings=True, rope=Rope(theta=500000.0)),
        "llama_relu_biases": replace(llama, activation="relu", **biases),
        "llama_silu_biases": replace(llama, **biases),
        "llama_relu2": replace(llama, activation="relu2"),
        "llama_gelu_tanh": replace(llama, activation="gelu_tanh"),
        "llama_linear": replace(llama, rope=Rope(10000.0, "linear", factor=2.5)),
        "llama_llama3": replace(llama, rope=Rope(10000.0, "llama3", factor=8.0, original_max_position=32)),
        "llama_yarn": replace(llama, rope=yarn),
        "prosparse": replace(llama, activation="fatrelu", activation_threshold=0.2),
        "mistral": replace(llama, family="mistral", sliding_window=7, sliding_window_layers=(0, 1)),
        "bamboo": replace(llama, family="bamboo", activation="drelu", head_count=6, kv_head_count=2, head_dim=16),
        "qwen2": replace(llama, family="qwen2", qkv_bias=True, sliding_window=5, sliding_window_layers=(1,)),
        "qwen3": replace(llama, family="qwen3", qk_norm=True, head_dim=16, tied_embeddings=True),
        "minicpm": replace(
            llama,
            family="minicpm",
            activation="fatrelu",
            activation_threshold=0.01,
            embedding_scale=3.0,
            residual_scale=0.7,
            logit_scale=0.25,
            tied_embeddings=True,
        ),
        "opt": opt,
        "opt_gelu": replace(opt, activation="gelu", tied_embeddings=False),
        "falcon_7b": replace(falcon, shared_norm=True, kv_head_count=1),
        "falcon_7b_relu": replace(falcon, shared_norm=True, kv_head_count=1, activation="relu"),
        "falcon_40b": replace(falcon, tied_embeddings=False),
        "arcee": replace(llama, family="arcee", gated=False, activation="relu2", rope=yarn),
        "nemotron": replace(layered, family="nemotron", activation="relu2", rope=Rope(10000.0, rotated=6)),
        "jais2": replace(layered, family="jais2", activation="relu2", kv_head_count=9, **biases),
        "gemma3": replace(
            llama,
            family="gemma3",
            activation="gelu_tanh",
            head_dim=16,
            qk_norm=True,
            post_norms=True,
            rope=Rope(1e6, "linear", factor=2.0),
            local_rope=Rope(10000.0),
            sliding_window=5,
            sliding_window_layers=(0,),
            embedding_scale=90**0.5,
            score_scale=0.8,
            tied_embeddings=True,
        ),
        "bitnet": replace(llama, family="bitnet", activation="relu2", sub_norms=True, tied_embeddings=True),
        "bitnet_silu": replace(llama, family="bitnet", sub_norms=True),
        "falcon_sequential": replace(falcon, parallel=False, kv_head_count=9, **biases),
    }


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Float32 weights by canonical name, in the logical (stacked) shapes, of a size that keeps activations near 1."""
    random = np.random.default_rng(seed)
    weights = {}
    for spec in tensor_specs(config):
        w = random.standard_normal(spec.shape, np.float32)
        if spec.name in ("embedding", "position_embedding"):
            w *= 0.5
        elif spec.name == "down_T":
            w *= spec.shape[-2] ** -0.5
        elif spec.matrix:
            w *= spec.shape[-1] ** -0.5
        else:
            w = 0.1 * w + (1 if spec.name.endswith("norm.weight") else 0)
        weights[spec.name] = w.astype(np.float32)
    return weights


# A format of its own for each of the matrices that read the same, as `convert --bits` may choose them.
MIXED: dict[str, WeightFormat] = {"k": "q8", "v": "q6", "o": "q8", "gate": "q6", "down": "q6", "down_T": "q8"}


def stored(
    config: ModelConfig, weight_format: WeightFormat, seed: int = 0, others: Mapping[str, WeightFormat] | None = None
) -> tuple[dict[str, NDArray], dict[str, WeightFormat], dict[str, NDArray[np.float32]]]:
    """Stored arrays, their formats, and the float32 weights that they stand for; `others` are formats by name."""
    arrays: dict[str, NDArray] = {}
    formats: dict[str, WeightFormat] = {}
    exact: dict[str, NDArray[np.float32]] = {}
    for name, weights in random_weights(config, seed).items():
        spec = next(s for s in tensor_specs(config) if s.name == name)
        if not spec.matrix:
            arrays[name] = exact[name] = weights
            continue
        chosen: WeightFormat = "f32" if name in ("position_embedding", "router") else weight_format
        if weight_format in ("q4", "ternary") and name in ("embedding", "lm_head"):
            chosen = "q8"
        chosen = (others or {}).get(name, chosen)
        formats[name] = chosen
        layers = [quantize(w, chosen) for w in (weights if spec.stacked else weights[None])]
        for suffix in layers[0]:
            stack = np.stack([parts[suffix] for parts in layers])
            arrays[name + suffix] = np.ascontiguousarray(stack if spec.stacked else stack[0])
        dense = np.stack([dequantize(parts, chosen, spec.shape[-1]) for parts in layers])
        exact[name] = dense if spec.stacked else dense[0]
    return arrays, formats, exact


def canonical_weights(
    config: ModelConfig, checkpoint: Mapping[str, NDArray], source: Callable[..., Source]
) -> dict[str, NDArray[np.float32]]:
    """What `source` (hf_source, gguf_source) makes of the tensors of a checkpoint, stacked over layers."""

    def build(name: str, layer: int | None) -> NDArray[np.float32]:
        found = source(config, name, layer, checkpoint)
        arrays = [np.asarray(checkpoint[n], np.float32) for n in found.names]
        if found.item is not None:
            arrays[0] = arrays[0][found.item[0]]
        return found.build(arrays)

    return {
        spec.name: np.stack([build(spec.name, i) for i in range(spec.shape[0])])
        if spec.stacked
        else build(spec.name, None)
        for spec in tensor_specs(config)
    }


def random_tokens(config: ModelConfig, count: int, seed: int = 0) -> list[int]:
    """Token ids, uniform over the vocabulary."""
    return [int(t) for t in np.random.default_rng(seed).integers(0, config.vocab_size, count)]


def block_table(length: int, first: int = 0, step: int = 1, size: int = BLOCK_SIZE) -> list[int]:
    """Blocks of `size` for `length` tokens: first, first + step, ... Another step than 1 makes them non-contiguous."""
    return [first + step * i for i in range(-(-length // size))]


def make_batch(chunks: Sequence[tuple[Sequence[int], int]], tables: Sequence[Sequence[int]]) -> Batch:
    """A step in which sequence i adds the tokens chunks[i][0] from position chunks[i][1], all rows with logits."""
    tokens = [t for chunk, _ in chunks for t in chunk]
    positions = [start + i for chunk, start in chunks for i in range(len(chunk))]
    sequences = [s for s, (chunk, _) in enumerate(chunks) for _ in chunk]
    padded = np.zeros((len(tables), max(map(len, tables))), np.int32)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
    return Batch(
        tokens=np.array(tokens, np.int32),
        positions=np.array(positions, np.int32),
        sequences=np.array(sequences, np.int32),
        block_tables=padded,
        context_lengths=np.array([start + len(chunk) for chunk, start in chunks], np.int32),
        logit_rows=np.arange(len(tokens), dtype=np.int32),
    )


def run_in_chunks(executor: Any, tokens: list[int], sizes: list[int]) -> NDArray[np.float32]:
    """Logits of all tokens, the prompt cut into chunks."""
    table, out, start = block_table(len(tokens), first=1, step=2, size=executor.block_size), [], 0
    for size in sizes:
        out.append(executor.forward(make_batch([(tokens[start : start + size], start)], [table])).copy())
        start += size
    assert start == len(tokens)
    return np.concatenate(out)


def relative_error(found: NDArray, expected: NDArray) -> float:
    """Largest difference, relative to the largest expected magnitude."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())
