"""Matrix products, norms and activation functions of the CUDA executor, alone: every format and choice of kernel."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import simulator
from model_zoo import relative_error, zoo
from numpy.typing import NDArray

from svdengine.kernels import reference
from svdengine.kernels.cuda import gemm, gemv
from svdengine.kernels.cuda.elementwise import ACTIVATIONS, activate_ffn, add_parts
from svdengine.kernels.cuda.intrinsics import SIMULATED
from svdengine.kernels.cuda.model import Matrix, Norm, place_matrix
from svdengine.kernels.cuda.norm import Following, add_parts_and_normalize, normalize
from svdengine.kernels.cuda.rounding import ROUND_THREADS, rounded_for, takes_integers
from svdengine.kernels.cuda.score import round_rows
from svdengine.kernels.formats import WEIGHT_FORMATS, WeightFormat, dequantize, padded_columns, quantize
from svdengine.models.config import Activation

ROWS, COLUMNS = 21, 70  # neither a multiple of what blocks take


def make_matrix(device: Any, weight_format: WeightFormat, bias_size: int) -> tuple[Matrix, NDArray, NDArray]:
    """A matrix on the device, and the weights and bias that it stands for."""
    random = np.random.default_rng(0)
    weights, bias = random.standard_normal((ROWS, COLUMNS), np.float32), random.standard_normal(bias_size, np.float32)
    parts = quantize(weights, weight_format)
    matrix = place_matrix(device, [parts], weight_format, COLUMNS, device.upload(bias))
    return matrix, dequantize(parts, weight_format, COLUMNS), bias


def product_bound(weight_format: WeightFormat) -> float:
    """How far products may be off: float32, or activations of 16 bits in groups of 32."""
    return 1e-4 if takes_integers(weight_format) else 1e-5


def as_read(device: Any, x: NDArray[np.float32], weight_format: WeightFormat) -> Any:
    """Rows of x on the device, as products with a format read them."""
    rows, stride = padded(x), padded_columns(x.shape[1])
    return rounded_for(
        device, [weight_format], device.upload(rows), device.zeros(rows.size, np.float32), stride, len(x)
    )


def padded(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows filled with zeros to what kernels read."""
    out = np.zeros((len(x), padded_columns(x.shape[1])), np.float32)
    out[:, : x.shape[1]] = x
    return out


@pytest.mark.parametrize(
    ("weight_format", "n", "many"),
    [(name, 1, many) for name in WEIGHT_FORMATS for many in (False, True)] + [("f32", 2, False), ("f32", 5, False)],
)
def test_products_of_every_format(
    device: Any, monkeypatch: pytest.MonkeyPatch, weight_format: WeightFormat, n: int, many: bool
) -> None:
    if many:
        monkeypatch.setattr(gemv, "_MANY", 1)
    matrix, weights, bias = make_matrix(device, weight_format, ROWS)
    x = np.random.default_rng(1).standard_normal((n, COLUMNS), np.float32)
    before = np.random.default_rng(2).standard_normal((n, 32), np.float32)
    y = device.upload(before)
    gemv.multiply(device, matrix, as_read(device, x, weight_format), 128, y, 32, n, factor=0.5, add=True)
    expected = before.copy()
    expected[:, :ROWS] += 0.5 * (x @ weights.T + bias)
    assert relative_error(device.download(y).reshape(n, 32), expected) < product_bound(weight_format)
    gemv.multiply(device, matrix, as_read(device, x, weight_format), 128, y, 32, n)
    expected[:, :ROWS] = x @ weights.T + bias
    assert relative_error(device.download(y).reshape(n, 32), expected) < product_bound(weight_format)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("weight_format", ["q8", "q4"])
def test_an_activation_that_is_not_finite_is_seen_in_products(
    device: Any, weight_format: WeightFormat, value: float
) -> None:
    matrix, _, _ = make_matrix(device, weight_format, ROWS)
    x, y = np.ones((1, COLUMNS), np.float32), device.zeros(32, np.float32)
    x[0, 40] = value
    gemv.multiply(device, matrix, as_read(device, x, weight_format), 128, y, 32, 1)
    assert not np.isfinite(device.download(y)[:ROWS]).any()


def test_rounded_rows_hold_values_steps_and_sums(device: Any) -> None:
    x = np.random.default_rng(0).standard_normal((2, 128)).astype(np.float32)
    x[1, 32:64] = 0
    rows = device.download(as_read(device, x, "q8")).reshape(2, 128)
    codes = rows[:, :64].copy().view(np.uint8).reshape(2, 8, 2, 16)
    values = 256 * codes[:, :, 0].view(np.int8).astype(int) + codes[:, :, 1]
    steps, sums = rows[:, 64:72:2], rows[:, 65:72:2]
    found = values.reshape(2, 4, 32) * steps[..., None]
    assert np.abs(found - x.reshape(2, 4, 32)).max() <= np.abs(x).max() / 32512 * 0.501
    np.testing.assert_allclose(sums, found.sum(2), rtol=1e-5, atol=1e-6)
    assert not values.reshape(2, 4, 32)[1, 1].any() and steps[1, 1] == 0


@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
@pytest.mark.parametrize(("n", "sharers"), [(1, 1), (1, 8), (3, 1), (3, 2)])
def test_transposed_products_of_every_format(
    device: Any, monkeypatch: pytest.MonkeyPatch, weight_format: WeightFormat, n: int, sharers: int
) -> None:
    monkeypatch.setattr(gemv, "LEAST_NEURONS", 8)
    monkeypatch.setattr(gemv, "SHARERS", sharers)  # one warp has seven neurons of a part, eight have one or none
    matrix, weights, _ = make_matrix(device, weight_format, COLUMNS)
    hidden = np.random.default_rng(1).standard_normal((n, ROWS), np.float32)
    partial = device.upload(np.full(64 * 128, np.nan, np.float32))
    parts = gemv.multiply_transposed(device, matrix, device.upload(padded(hidden)), 64, partial, n)
    assert parts == 3
    found = device.download(partial)[: n * parts * 128].reshape(n, parts, 128)[:, :, :COLUMNS].sum(1)
    assert relative_error(found, hidden @ weights) < 1e-5


@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
def test_matrices_are_widened(device: Any, weight_format: WeightFormat) -> None:
    matrix, weights, _ = make_matrix(device, weight_format, ROWS)
    to = device.zeros(ROWS * 128, np.float16)
    arguments = (matrix.words, matrix.scale, matrix.low, matrix.row, to, matrix.stride)
    device.launch(gemm.widen_kernel(weight_format), (ROWS, 1), gemm.THREADS, *arguments)
    found = device.download(to).reshape(ROWS, 128)[:, :COLUMNS]  # the padding of q4 is not zero, and meets zeros only
    np.testing.assert_allclose(found, weights.astype(np.float16), rtol=1e-3, atol=1e-6)


def test_activations_that_float16_does_not_hold_are_cut(device: Any) -> None:
    x = np.zeros((2, 64), np.float32)
    x[:, :4] = [1e6, -1e6, 1.0, 2.0]
    to = device.zeros(2 * 64, np.float16)
    device.launch(gemm.narrow, (1, 2), gemm.THREADS, device.upload(x), to, 64, 64)
    np.testing.assert_array_equal(device.download(to).reshape(2, 64)[:, :4], [[65504, -65504, 1, 2]] * 2)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", get_args(Activation))
def test_activation_functions(device: Any, activation: Activation, gated: bool) -> None:
    config = replace(zoo()["llama"], activation=activation, activation_threshold=0.3, gated=gated, ffn_size=33)
    x = np.linspace(-100, 100, 33, dtype=np.float32)
    x[10:23] = np.linspace(-3, 3, 13)
    up = np.linspace(-2, 1, 33, dtype=np.float32)
    hidden = device.zeros(64, np.float32)
    activate_ffn(device, config, device.upload(np.concatenate([x, up])), 66, hidden, 64, 1)
    expected = reference.activate(activation, x, 0.3)
    if gated:
        expected = expected * (np.maximum(up, 0) if activation == "drelu" else up)
    np.testing.assert_allclose(device.download(hidden)[:33], expected, rtol=2e-5, atol=1e-6)
    assert activation in ACTIVATIONS


def room(device: Any, rows: int = 2) -> Any:
    """The buffers of a workspace that norms use, at 320 items a row."""
    fine, coarse = (device.zeros(rows * 320, np.float32) for _ in range(2))
    return SimpleNamespace(
        fine=fine, coarse=coarse, tickets=device.zeros(rows, np.int32), sizes=SimpleNamespace(hidden=320)
    )


@pytest.mark.parametrize("name", ["llama", "falcon_7b"])
@pytest.mark.parametrize("backwards", [False, True])
def test_a_norm_after_a_sum_is_that_of_the_whole_row_and_rounded_as_alone(
    device: Any, name: str, backwards: bool
) -> None:
    config, random = replace(zoo()[name], hidden_size=300), np.random.default_rng(1)
    partial, x = random.standard_normal((2, 3, 320), np.float32), random.standard_normal((2, 320), np.float32)
    bias, weight = random.standard_normal((2, 300), np.float32)
    norm, together, alone = Norm(device.upload(weight), device.upload(bias)), room(device), room(device)
    together.partial, together.x, out = device.upload(partial), device.upload(x), device.zeros(2 * 320, np.float32)
    following, down_bias = Following(norm, out, True), device.upload(bias)
    with simulator.backwards() if backwards and SIMULATED else nullcontext():  # whichever block is the last
        add_parts_and_normalize(device, config, together, 3, down_bias, 2, following)
    summed, expected = device.upload(x), device.zeros(2 * 320, np.float32)
    add_parts(device, device.upload(partial), 3, down_bias, summed, 300, 320, 2, config.residual_scale)
    np.testing.assert_array_equal(device.download(together.x), device.download(summed))
    normalize(device, config, alone, norm, summed, expected, 320, 2)
    np.testing.assert_array_equal(device.download(out), device.download(expected))
    arrays = (alone.fine, alone.fine, alone.coarse, alone.coarse)
    device.launch(round_rows, (2, 2), ROUND_THREADS, expected, *arrays, 300, 320, 320)
    for rounded in ("fine", "coarse"):
        found, right = (device.download(getattr(work, rounded)).view(np.uint32) for work in (together, alone))
        np.testing.assert_array_equal(found, right)
        assert found.any()
    assert not device.download(together.tickets).any()


@pytest.mark.parametrize("name", ["llama", "falcon_7b"])
def test_norms_of_chosen_rows(device: Any, name: str) -> None:
    config = replace(zoo()[name], hidden_size=300)
    random = np.random.default_rng(0)
    x = random.standard_normal((3, 320), np.float32) + 5
    weight, bias = random.standard_normal((2, 300), np.float32)
    bias = bias if config.norm == "layer" else 0 * bias
    norm, out = Norm(device.upload(weight), device.upload(bias)), device.zeros(2 * 320, np.float32)
    chosen = device.upload(np.array([2, 0], np.int32))
    normalize(device, config, room(device), norm, device.upload(x), out, 320, 2, chosen=chosen, factor=2.0)
    expected = reference.normalize(config, {"n.weight": weight, "n.bias": bias}, "n", x[[2, 0], :300])
    assert relative_error(device.download(out).reshape(2, 320)[:, :300], 2 * expected) < 1e-5


def test_parts_are_added_to_rows(device: Any) -> None:
    random = np.random.default_rng(0)
    partial, x = random.standard_normal((2, 3, 64), np.float32), random.standard_normal((2, 64), np.float32)
    bias, y = random.standard_normal(50, np.float32), device.upload(x)
    add_parts(device, device.upload(partial), 3, device.upload(bias), y, 50, 64, 2, 0.5)
    expected = x.copy()
    expected[:, :50] += 0.5 * (partial.sum(1)[:, :50] + bias)
    assert relative_error(device.download(y).reshape(2, 64), expected) < 1e-6
