"""The definition of correct: a transformer's forward pass in float32 NumPy, over a KV cache of blocks.

Every other executor is tested against this one. It favours reading order over speed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svdengine.kernels.base_executor import BaseExecutor, ExecutorSetup
from svdengine.kernels.batch import Batch
from svdengine.kernels.executor import FfnMode, FfnPath, KvDtype, Logits
from svdengine.kernels.formats import WeightFormat, dequantize, gather_parts
from svdengine.kernels.kv_q8 import dequantize_kv, key_shape, pack_kv, quantize_kv, unpack_kv
from svdengine.kernels.norm import normalize, rms_norm
from svdengine.kernels.predictor import LayerPredictor, Predictor, scores
from svdengine.kernels.rope import rope_tables
from svdengine.kernels.router import route
from svdengine.models.config import Activation, ModelConfig
from svdengine.models.tensors import FFN_MATRICES, place_of, tensor_specs

Array = NDArray[np.float32]
Weights = Mapping[str, Array]  # canonical name -> array; of one layer, without the layer axis


class ReferenceExecutor(BaseExecutor):
    """An Executor (kernels/executor.py) for any ModelConfig, on float32 weights in their logical shapes.

    `ffn` and `predictor` may be set between steps: with ffn="sparse" every row of every step goes through
    `sparse_ffn`, prefill included; "auto" means "dense" here, since nothing is gained in NumPy.
    """

    name = "reference"

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        block_count: int = 256,
        max_batch_rows: int = 512,
        *,
        kv_dtype: KvDtype = "f32",
        predictor: Predictor | None = None,
        ffn: FfnMode = "dense",
    ):
        """Take `weights` as `tensor_specs(config)` names and shapes them: tensors of layers are stacked.

        Keys and values are kept in float32, whatever `kv_dtype`; with "q8" they are rounded to what 8 bits hold.

        Raises ValueError when a tensor is missing or has another shape.
        """
        config.validate()
        super().__init__(ExecutorSetup(config, weights, {}, block_count, max_batch_rows, kv_dtype=kv_dtype, ffn=ffn))
        self.predictor = predictor
        self._rounds_kv = kv_dtype == "q8"
        self._offsets, self._factors = key_shape(config, weights)
        self._kept: list[Array] | None = None  # what the FFNs of a step read, where it is wanted
        self._residual = np.empty((0, config.hidden_size), np.float32)  # of the latest step
        self.weights, self.layers, self.blocks = _by_layer(config, weights)
        slots = (config.layer_count, self.block_count * self.block_size, config.kv_head_count, config.head_dim)
        self.keys = np.zeros(slots, np.float32)  # (layer, slot, kv head, head_dim), after rope
        self.values = np.zeros(slots, np.float32)  # (layer, slot, kv head, head_dim)

    def forward(self, batch: Batch) -> Logits:
        """Run one step; see `Executor`. Raises ValueError for a batch that breaks the rules of `Batch`."""
        self._check(batch)
        config, w = self.config, self.weights

        # Embed the tokens: (n, d).
        x = w["embedding"][batch.tokens] * np.float32(config.embedding_scale)
        if config.learned_positions:
            x = x + w["position_embedding"][batch.positions]

        # Attention and FFN of each layer read the residual stream and add to it.
        scale = np.float32(config.residual_scale)
        shift = np.float32(0) if batch.sparsity_bias is None else batch.sparsity_bias[batch.sequences, None]
        for layer, lw in enumerate(self.layers):
            entering = x
            h = normalize(config, lw, "attention_norm", x)
            attended = self._attention(layer, batch, h)
            if config.post_norms:
                attended = normalize(config, lw, "attention_post_norm", attended)
            if config.parallel:
                h = h if config.shared_norm else normalize(config, lw, "ffn_norm", x)
                x = x + scale * (attended + self._ffn(layer, h, h, shift))
            else:
                x = x + scale * attended
                h = normalize(config, lw, "ffn_norm", x)
                added = self._ffn(layer, h, entering if config.early_router else h, shift)
                x = x + scale * (normalize(config, lw, "ffn_post_norm", added) if config.post_norms else added)

        # Only the rows that are asked for are projected on the vocabulary.
        self._residual = x
        x = normalize(config, w, "output_norm", x[batch.logit_rows])
        head = w["embedding"] if config.tied_embeddings else w["lm_head"]
        return x @ head.T * np.float32(config.logit_scale)

    def hidden_states(self) -> Array:
        """See `HiddenStates`."""
        self._check_open()
        return self._normed(self._residual)

    def ffn_path(self, n: int) -> FfnPath:
        """How a step runs its FFNs; see `Executor`."""
        return "predict" if self.ffn == "sparse" else "dense"

    def read_blocks(self, blocks: Sequence[int]) -> NDArray[Any]:
        """See `BlockStore`."""
        found = np.stack([pool[:, list(blocks)].swapaxes(0, 1) for pool in self._pools()], 1)
        if not self._rounds_kv:
            return found
        found[:, 0] /= self._factors[:, None]
        return pack_kv(*quantize_kv(found))

    def write_blocks(self, blocks: Sequence[int], data: NDArray[Any]) -> None:
        """See `BlockStore`."""
        if self._rounds_kv and data.dtype == np.uint8:
            data = dequantize_kv(*unpack_kv(data), self.config.head_dim)
            data[:, 0] *= self._factors[:, None]
        for i, pool in enumerate(self._pools()):
            expected = (len(blocks), 2, len(pool), *pool.shape[2:])
            if data.shape != expected or data.dtype != np.float32:
                raise ValueError(f"found {data.dtype} {data.shape}, expected float32 {expected}")
            pool[:, list(blocks)] = data[:, i].swapaxes(0, 1)

    def _place_predictor(self, predictor: Predictor | None) -> None:
        """It is read where it lies."""

    def _keep_ffn_inputs(self, batch: Batch) -> Array:
        self._kept, shape = [], (self.config.layer_count, len(batch.tokens), self.config.chosen_blocks)
        self.kept_experts = np.zeros(shape, np.int32) if self.config.expert_count else None
        try:
            self.forward(batch)
            return np.stack(self._kept)
        finally:
            self._kept = None

    def _run_ffns(self, inputs: Array, layers: int, sparsity_bias: float) -> Array:
        outputs = [
            self._ffn(layer, x, x, np.float32(sparsity_bias))
            for layer, x in enumerate(inputs[:layers] if inputs.ndim == 3 else [inputs] * layers)
        ]
        return np.sum(outputs, 0) * np.float32(self.config.residual_scale)

    def _release(self) -> None:
        self.weights, self.layers, self.blocks = {}, [], []
        self.keys = self.values = np.empty((0, 0, 0, 0), np.float32)

    def _pools(self) -> tuple[Array, Array]:
        """Keys and values by block: (layers, blocks, block_size, kv heads, head_dim)."""
        shape = (len(self.keys), self.block_count, self.block_size, *self.keys.shape[2:])
        return self.keys.reshape(shape), self.values.reshape(shape)

    def _ffn(self, layer: int, x: Array, routed_by: Array, sparsity_bias: Array | np.float32) -> Array:
        """The FFN of the rows x (n, d), whose experts are chosen by `routed_by` (n, d)."""
        config, blocks = self.config, self.config.blocks_of(layer)
        if self._kept is not None:
            self._kept.append(x)
        if layer not in config.expert_layers:
            return np.sum([self._block(layer, block, x, sparsity_bias) for block in blocks], 0)

        # Each expert runs the rows that chose it, and adds its share to them.
        chosen, weights = route(config, routed_by @ self.layers[layer]["router"].T)
        if self._kept is not None and self.kept_experts is not None:
            self.kept_experts[layer] = chosen
        y = np.zeros_like(x)
        for expert, block in enumerate(blocks):
            rows, place = np.nonzero(chosen == expert)
            if len(rows):
                self._chosen[block] += len(rows)
                bias = sparsity_bias[rows] if isinstance(sparsity_bias, np.ndarray) else sparsity_bias
                y[rows] += weights[rows, place, None] * self._block(layer, block, x[rows], bias)
        return y

    def _block(self, layer: int, block: int, x: Array, sparsity_bias: Array | np.float32) -> Array:
        """An FFN block of a layer, of rows (n, d), by the path that was chosen."""
        if self.ffn != "sparse":
            return ffn(self.config, self.blocks[block], x)
        if self.predictor is None:
            raise ValueError("ffn='sparse' needs a predictor")
        counts, predictor = self._counted[layer], self.predictor.layers[block]
        return sparse_ffn(self.config, self.blocks[block], x, predictor, sparsity_bias, counts)

    def _attention(self, layer: int, batch: Batch, x: Array) -> Array:
        """Causal attention of the rows (n, d) over their sequences, whose keys and values are cached first."""
        config, lw = self.config, self.layers[layer]
        q, k, v = project(config, lw, layer, batch.positions, x)

        # All rows of the step are in the cache before any of them attends.
        if self._rounds_kv:
            factor = self._factors[layer]
            k, v = (dequantize_kv(*quantize_kv(x), config.head_dim) for x in ((k - self._offsets[layer]) / factor, v))
            k = k * factor
        slots = slots_of(batch.block_tables[batch.sequences], batch.positions[:, None], self.block_size)[:, 0]
        self.keys[layer, slots], self.values[layer, slots] = k, v

        # Each sequence attends over its own slots, wherever they lie.
        window = config.sliding_window if layer in config.sliding_window_layers else 0
        mixed = np.empty_like(q)
        for sequence in np.unique(batch.sequences):
            rows = np.flatnonzero(batch.sequences == sequence)
            seen = np.arange(batch.context_lengths[sequence])
            slots = slots_of(batch.block_tables[sequence], seen, self.block_size)
            distance = batch.positions[rows, None] - seen
            visible = (distance >= 0) & (distance < window) if window else distance >= 0
            seen_keys, seen_values = self.keys[layer, slots], self.values[layer, slots]
            mixed[rows] = attend(q[rows], seen_keys, seen_values, visible, config.attention_scale)
        heads_joined = mixed.reshape(len(x), -1)
        if config.sub_norms:
            heads_joined = normalize(config, lw, "attention_sub_norm", heads_joined)
        return linear(heads_joined, lw["o"], lw.get("o.bias"))


def project(
    config: ModelConfig, weights: Weights, layer: int, positions: NDArray[np.int32], x: Array
) -> tuple[Array, Array, Array]:
    """Queries, keys and values of normed rows x (n, d), normed and rotated: each (n, heads, head_dim)."""
    heads = (len(x), -1, config.head_dim)
    rows = {name: linear(x, weights[name], weights.get(f"{name}.bias")) for name in ("q", "k", "v")}
    if config.qk_norm_joint:
        rows |= {name: rms_norm(rows[name], weights[f"{name}_norm.weight"], config.norm_eps) for name in ("q", "k")}
    q, k, v = (row.reshape(heads) for row in rows.values())
    if config.qk_norm and not config.qk_norm_joint:
        q, k = (rms_norm(a, weights[f"{name}_norm.weight"], config.norm_eps) for a, name in ((q, "q"), (k, "k")))
    if (rope := config.rope_of(layer)) is not None:
        cos, sin = rope_tables(config, positions, rope)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    return q, k, v


def ffn(config: ModelConfig, weights: Weights, x: Array) -> Array:
    """The feed-forward network of a layer: (n, d) -> (n, d). `weights` holds that layer's tensors."""
    down = weights["down_T"].T if config.sparse_ffn else weights["down"]
    return linear(dense_neurons(config, weights, x), down, weights.get("down.bias"))


def dense_neurons(config: ModelConfig, weights: Weights, x: Array) -> Array:
    """What the down projection reads, for normed rows x (n, d): (n, f).

    The neurons' activations are act(gate x) * (up x) when gated, else act(up x).
    """
    up = linear(x, weights["up"], weights.get("up.bias"))
    if config.gated:
        gate = linear(x, weights["gate"], weights.get("gate.bias"))
        if config.activation == "drelu":
            up = activate("relu", up)
        neurons = activate(config.activation, gate, config.activation_threshold) * up
    else:
        neurons = activate(config.activation, up, config.activation_threshold)
    return normalize(config, weights, "ffn_sub_norm", neurons) if config.sub_norms else neurons


def sparse_ffn(
    config: ModelConfig,
    weights: Weights,
    x: Array,
    predictor: LayerPredictor,
    sparsity_bias: Array | np.float32,
    counts: NDArray[np.int64] | None = None,
) -> Array:
    """The FFN computed only on the neurons that the predictor names: (n, d) -> (n, d).

    `sparsity_bias` (n, 1) raises the thresholds of a row, in units of the predictor. P are the neurons whose score is
    positive; Q are those of P whose exact gate is active; all others contribute nothing, whatever their weights hold.
    With `config.sub_norms` the mean square is that of Q too: what is missed makes the rest larger.
    An executor reads the gate's rows of P and the up and down rows of Q. Only models with `config.sparse_ffn`.
    `counts` (3,) is added the sizes of P and Q, and n times f.
    """
    # P: predicted from the scores. (n, f)
    predicted = scores(predictor, x, sparsity_bias) > 0

    # Q: the exact gate prunes what was predicted wrongly.
    name = "gate" if config.gated else "up"
    gate = activate(
        config.activation, linear(x, weights[name], weights.get(f"{name}.bias")), config.activation_threshold
    )
    active = predicted & (gate > 0)
    if counts is not None:
        counts += predicted.sum(), active.sum(), predicted.size

    # h: act(gate x) * (up x) on Q.
    neurons = gate
    if config.gated:
        up = linear(x, weights["up"], weights.get("up.bias"))
        neurons = gate * (activate("relu", up) if config.activation == "drelu" else up)
    neurons = np.where(active, neurons, np.float32(0))
    if config.sub_norms:
        neurons = normalize(config, weights, "ffn_sub_norm", neurons)
    return linear(neurons, weights["down_T"].T, weights.get("down.bias"))


def activate(activation: Activation, x: Array, threshold: float = 0.0) -> Array:
    """The activation function, elementwise. `threshold` is that of fatrelu."""
    if activation in ("relu", "drelu"):
        return np.maximum(x, 0)
    if activation == "fatrelu":  # ProSparse, arXiv:2402.13516
        return np.where(x > np.float32(threshold), x, np.float32(0))
    if activation == "relu2":
        return np.square(np.maximum(x, 0))
    if activation == "silu":
        return x / (1 + np.exp(-np.clip(x, -80, None)))
    if activation == "gelu":
        return x * np.float32(0.5) * (1 + _erf(x * np.float32(math.sqrt(0.5))))
    inner: Array = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
    return x * np.float32(0.5) * (1 + np.tanh(inner))


def linear(x: Array, matrix: Array, bias: Array | None) -> Array:
    """Multiply x (n, columns) by the matrix (rows, columns) and add the bias (rows,): (n, rows)."""
    product = x @ matrix.T
    return product if bias is None else product + bias


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate heads (n, heads, head_dim): dimension i pairs with i + head_dim / 2. `cos`, `sin`: (n, head_dim / 2)."""
    first, second = np.split(x, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def attend(q: Array, k: Array, v: Array, visible: NDArray[np.bool_], scale: float) -> Array:
    """Softmax attention of q (n, heads, head_dim) over k and v (t, kv heads, head_dim), where `visible` (n, t).

    Products are multiplied by `scale`. Neighbouring query heads share a kv head (GQA). Every row must see at least one
    position. Returns the shape of q.
    """
    n, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    queries = q.reshape(n, kv_heads, heads // kv_heads, head_dim).transpose(1, 2, 0, 3)  # (kv, group, n, head_dim)
    keys, values = k.transpose(1, 2, 0)[:, None], v.transpose(1, 0, 2)[:, None]  # (kv, 1, head_dim, t), (kv, 1, t, ..)
    scores = np.where(visible, queries @ keys * np.float32(scale), np.float32(-np.inf))
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = weights @ values / weights.sum(-1, keepdims=True)  # (kv, group, n, head_dim)
    return mixed.transpose(2, 0, 1, 3).reshape(q.shape)


def slots_of(block_tables: NDArray[np.int32], positions: NDArray, block_size: int) -> NDArray:
    """Cache slots of `positions` (..., t) of sequences with `block_tables` (..., blocks): (..., t)."""
    blocks = np.take_along_axis(block_tables, positions // block_size, -1)
    return blocks * block_size + positions % block_size


def _by_layer(
    config: ModelConfig, weights: Weights
) -> tuple[dict[str, Array], list[dict[str, Array]], list[dict[str, Array]]]:
    """The tensors outside the layers, those of each layer, and those of each FFN block; shapes are checked.

    Without experts, a layer's are its block's too.
    """
    shared: dict[str, Array] = {}
    layers: list[dict[str, Array]] = [{} for _ in range(config.layer_count)]
    blocks: list[dict[str, Array]] = [{} for _ in range(config.ffn_blocks)] if config.expert_count else layers
    for spec in tensor_specs(config):
        if spec.name not in weights:
            raise ValueError(f"the weights lack {spec.name}")
        array = np.asarray(weights[spec.name], np.float32)
        if array.shape != spec.shape:
            raise ValueError(f"{spec.name} must have shape {spec.shape}, found {array.shape}")
        if not spec.stacked:
            shared[spec.name] = array
            continue
        for index, one in enumerate(array):
            into = blocks if spec.name in FFN_MATRICES else layers
            into[index if into is blocks else place_of(config, spec.name, index).layer][spec.name] = one
    return shared, layers, blocks


@cache
def _erf_table() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x = np.linspace(0.0, 6.0, 1 << 15)
    return x, np.array([math.erf(value) for value in x])


def _erf(x: Array) -> Array:
    """Error function by linear interpolation in a table so fine that it is accurate to 5e-9; beyond 6 it is 1."""
    return np.copysign(np.interp(np.abs(x), *_erf_table()), x).astype(np.float32)


def float32_weights(
    config: ModelConfig, arrays: Mapping[str, NDArray], formats: Mapping[str, WeightFormat]
) -> dict[str, Array]:
    """Every canonical tensor in float32, in its logical shape, from the stored parts of a model file."""
    weights: dict[str, Array] = {}
    for spec in tensor_specs(config):
        if not spec.matrix:
            weights[spec.name] = np.asarray(arrays[spec.name], np.float32)
            continue
        # Layers and rows together.
        parts = {suffix: part.reshape(-1, part.shape[-1]) for suffix, part in gather_parts(arrays, spec.name).items()}
        w = dequantize(parts, formats[spec.name], spec.shape[-1])
        weights[spec.name] = w.reshape(spec.shape)
    return weights
