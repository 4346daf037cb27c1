"""Our kernels on this very device: each on a small case against its definition, before a model relies on them.

It runs on a context of its own: a kernel that fails may leave its context unusable.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from svdengine.errors import DeviceError
from svdengine.kernels.ascend.cann import Cann
from svdengine.kernels.ascend.custom_ops import CustomOps, load_custom_ops
from svdengine.kernels.ascend.device import AscendDevice
from svdengine.kernels.ascend.model import SparseRows, to_half
from svdengine.kernels.ascend.sparse import (
    SparseState,
    allocate_sparse,
    counts_of,
    make_hidden,
    place_predictor,
    run_gate,
    run_score,
    run_sum,
    run_up_down,
)
from svdengine.kernels.ascend.tensor import Tensor
from svdengine.kernels.formats import padded_columns, quantize
from svdengine.kernels.lowbit import quantize_lowbit
from svdengine.kernels.predictor import LayerPredictor, Predictor, scores
from svdengine.kernels.reference import sparse_ffn
from svdengine.models import ModelConfig


def _config(hidden_size: int, ffn_size: int) -> ModelConfig:
    return ModelConfig(
        family="llama", vocab_size=8, hidden_size=hidden_size, layer_count=1, head_count=1, kv_head_count=1, head_dim=8,
        ffn_size=ffn_size, max_position=8, norm="rms", norm_eps=1e-5, activation="fatrelu", activation_threshold=0.1,
        gated=True, rope=None, ffn_bias=True,
    )  # fmt: skip


# Several units of neurons a block, an unpadded width, biases and a threshold: every branch of a gated FFN's kernels.
# Then the long rows of a large model, which are multiplied one by one (ops/dots.h).
_CONFIGS = (_config(200, 5000), _config(4096, 256))
_RANK, _BITS = 40, 2  # of the predictor's factors and of its low-bit part
_CLOSE = 2e-2  # of scores and gates: nearer to the border, rounding decides; and of results, relative to the largest


def proven_custom_ops(cann: Cann, soc: str, folder: Path, index: int = 0) -> CustomOps | str:
    """The kernels that were built under `folder`, if they work, or one line on why FFNs run dense without them."""
    try:
        ops = load_custom_ops(cann, soc, folder)
        failed = failing_kernel(cann, ops, index)
    except DeviceError as error:
        return str(error)
    return ops if failed is None else f"the kernel {failed} gives wrong results on this device"


def failing_kernel(cann: Cann, ops: CustomOps, index: int = 0) -> str | None:
    """The first kernel, in the order in which they run, whose result is not its definition's. None: all are right.

    Raises DeviceError where one does not run at all.
    """
    device = AscendDevice(cann, index)
    try:
        return next((failed for config in _CONFIGS if (failed := _Case(device, ops, config).failing())), None)
    finally:
        device.close()


class _Case:
    """One row of a small FFN with a predictor, on the device and on the host."""

    def __init__(self, device: AscendDevice, ops: CustomOps, config: ModelConfig) -> None:
        random = np.random.default_rng(0)
        self.config = config
        f, d = config.ffn_size, config.hidden_size

        def matrix(rows: int, columns: int, scale: int) -> NDArray[np.float32]:
            return (random.standard_normal((rows, columns), np.float32) * np.float32(scale**-0.5)).astype(np.float16)

        def vector(size: int) -> NDArray[np.float32]:
            return np.float32(0.1) * random.standard_normal(size, np.float32)

        self.device = device
        self.weights = {"gate": matrix(f, d, d), "up": matrix(f, d, d), "down_T": matrix(f, d, f)}
        self.biases = {"gate.bias": vector(f), "up.bias": vector(f), "down.bias": vector(d)}
        self.x = random.standard_normal((1, d), np.float32).astype(np.float16)
        a, b = (quantize(w.astype(np.float32), "q8") for w in (matrix(f, _RANK, _RANK), matrix(_RANK, d, d)))
        q = quantize_lowbit(matrix(f, d, d).astype(np.float32), _BITS)
        self.predictor = LayerPredictor(_RANK, "q8", _BITS, a, b, q, vector(f), np.ones(f, np.float32))
        self.state: SparseState = allocate_sparse(device, config, ops, 1)

    def failing(self) -> str | None:
        """Run the kernels one after the other and look at what each made."""
        device, state, config = self.device, self.state, self.config
        placed = place_predictor(device, config, Predictor((self.predictor,), {}), 1)
        predictor, x = placed.layers[0], device.upload(self.x)
        rows, y = self._upload_rows(), device.empty(self.x.shape, np.float16)
        counts = [counts_of(state, 0, 0, which) for which in (0, 1)]
        z, rest = make_hidden(device, config, placed, 0, x)

        run_score(device, state, predictor, z, rest, device.zeros((1,), np.float32), counts[0], config.ffn_size)
        predicted = self._listed(state.predicted.indices, counts[0])
        if not self._is_predicted(predicted):
            return "svd_score"

        run_gate(device, config, state, rows, x, state.predicted, counts[0], counts[1])
        active, gates = self._listed(state.active.indices, counts[1]), self._listed(state.values, counts[1])
        if not self._is_active(predicted, active, gates):
            return "svd_gate"

        run_up_down(device, config, state, rows, x, counts[1])
        expected = self._output(predicted)
        without_bias = expected - self.biases["down.bias"]
        if not _is_close(device.read(state.partials).sum(0)[: expected.size], without_bias):
            return "svd_up_down"

        run_sum(device, config, state, rows, y)
        return None if _is_close(device.read(y)[0].astype(np.float32), expected) else "svd_sum"

    def _upload_rows(self) -> SparseRows:
        def rows(name: str) -> Tensor:
            weights = self.weights[name]
            width = padded_columns(weights.shape[1])
            return self.device.upload(to_half(np.pad(weights, ((0, 0), (0, width - weights.shape[1]))), name))

        biases = {name: self.device.upload(bias) for name, bias in self.biases.items()}
        return SparseRows(rows("gate"), rows("up"), rows("down_T"), *biases.values())

    def _listed(self, segments: Tensor, counts: Tensor) -> NDArray:
        """The entries of a list; none where its counts make no sense."""
        sizes, found = self.device.read(counts)[:, 0], self.device.read(segments)
        if sizes.min() < 0 or sizes.max() > found.shape[1]:
            return np.full(1, -1)
        return np.concatenate([segment[:size] for segment, size in zip(found, sizes, strict=True)])

    def _is_predicted(self, found: NDArray[np.int32]) -> bool:
        expected = scores(self.predictor, self.x.astype(np.float32))[0]
        wrong = np.setxor1d(found, np.flatnonzero(expected > 0))
        return _is_index(found, self.config.ffn_size) and bool((np.abs(expected[wrong]) < _CLOSE).all())

    def _is_active(self, predicted: NDArray[np.int32], found: NDArray[np.int32], gates: NDArray[np.float32]) -> bool:
        if not _is_index(found, self.config.ffn_size) or len(found) != len(gates):
            return False
        expected = self.weights["gate"].astype(np.float32) @ self.x[0].astype(np.float32) + self.biases["gate.bias"]
        limit = self.config.activation_threshold
        wrong = np.setxor1d(found, predicted[expected[predicted] > limit])
        return bool((np.abs(expected[wrong] - limit) < _CLOSE).all()) and _is_close(gates, expected[found])

    def _output(self, predicted: NDArray[np.int32]) -> NDArray[np.float32]:
        """The FFN of the row on the neurons that were listed, which are known to be right by now."""
        threshold = np.ones(self.config.ffn_size, np.float32)
        threshold[predicted] = -1
        layer = LayerPredictor(0, "q8", 0, {}, {}, {}, threshold, np.ones_like(threshold))
        weights = {name: w.astype(np.float32) for name, w in self.weights.items()} | self.biases
        return sparse_ffn(self.config, weights, self.x.astype(np.float32), layer, np.float32(0))[0]


def _is_index(found: NDArray[np.int32], neurons: int) -> bool:
    """Whether a list has neurons that there are, ascending."""
    inside = len(found) > 0 and found.min() >= 0 and found.max() < neurons
    return bool(inside and (np.diff(found) > 0).all())


def _is_close(found: NDArray[np.float32], expected: NDArray[np.float32]) -> bool:
    difference = np.abs(found - expected).max(initial=0.0)
    return bool(difference <= _CLOSE * np.abs(expected).max(initial=1e-6))
