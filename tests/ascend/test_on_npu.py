"""For the first day on a real NPU: each operator alone, our kernels, then models.

Without one, the operators run on the emulated NPU, which shows that the cases are sound, and the rest is skipped.

    source /usr/local/Ascend/ascend-toolkit/set_env.sh && svdengine build-ascend-ops
    pytest tests/ascend/test_on_npu.py
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fake_cann import Npu as EmulatedNpu
from fake_operators import OPERATORS
from model_zoo import random_tokens, relative_error, run_in_chunks, stored, zoo
from numpy.typing import NDArray
from random_predictors import make_predictor

from svdengine.executors import ascend_ops_folder
from svdengine.kernels.ascend.availability import find_npu
from svdengine.kernels.ascend.cann import load_cann
from svdengine.kernels.ascend.device import AscendDevice
from svdengine.kernels.ascend.executor import AscendExecutor
from svdengine.kernels.ascend.kv_cache import BLOCK_SIZE
from svdengine.kernels.ascend.self_test import proven_custom_ops
from svdengine.kernels.ascend.soc import soc_of
from svdengine.kernels.ascend.tensor import Tensor
from svdengine.kernels.base_executor import ExecutorSetup
from svdengine.kernels.reference import ReferenceExecutor

NPU = find_npu()
on_npu = pytest.mark.skipif(isinstance(NPU, str), reason=str(NPU))
BOUND = 5e-3  # relative to the largest value: float16, and sums in another order
RANDOM = np.random.default_rng(0)


def half(*shape: int, scale: float = 1.0) -> NDArray[np.float16]:
    return (scale * RANDOM.standard_normal(shape, np.float32)).astype(np.float16)


def angles(n: int, width: int) -> list[NDArray[np.float16]]:
    turns = RANDOM.uniform(0, 6, (1, n, 1, width // 2))
    return [np.concatenate([f(turns)] * 2, -1).astype(np.float16) for f in (np.cos, np.sin)]


def empty(*shape: int) -> NDArray[np.float16]:
    return np.zeros(shape, np.float16)


def index(*values: int) -> NDArray[np.int32]:
    return np.array(values, np.int32)


POOL = (6, BLOCK_SIZE, 128)  # blocks of two KV heads of 64
CASES: dict[str, list[Any]] = {
    "aclnnMm": [half(3, 256), half(256, 96, scale=0.06), empty(3, 96), 0],
    "aclnnBatchMatMul": [half(2, 6, 64), half(2, 64, 40, scale=0.1), empty(2, 6, 40), 0],
    "aclnnWeightQuantBatchMatmulV2": [
        half(3, 256), RANDOM.integers(-127, 128, (256, 96)).astype(np.int8), np.abs(half(8, 96, scale=1e-3)),
        None, None, None, None, 32, empty(3, 96),
    ],
    "aclnnRmsNorm": [half(3, 256), half(256), 1e-5, empty(3, 256), np.zeros((3, 1), np.float32)],
    "aclnnAddRmsNorm": [
        half(3, 256), half(3, 256), half(256), 1e-5, empty(3, 256), np.zeros((3, 1), np.float32), empty(3, 256),
    ],
    "aclnnLayerNorm": [half(3, 256), (256,), half(256), half(256), 1e-5, empty(3, 256), None, None],
    "aclnnRotaryPositionEmbedding": [half(1, 3, 4, 64), *angles(3, 64), 0, empty(1, 3, 4, 64)],
    "aclnnIncreFlashAttentionV4": [
        half(2, 1, 256), (half(*POOL),), (half(*POOL),), None, None, (5, 2 * BLOCK_SIZE + 5), *[None] * 7,
        np.array([[4, 0, 0], [2, 5, 1]], np.int32), None, 4, 0.125, b"BSH", 2, BLOCK_SIZE, 0, empty(2, 1, 256),
    ],
    "aclnnSoftmax": [half(2, 6, 40, scale=3), -1, empty(2, 6, 40)],
    "aclnnEmbedding": [half(50, 64), index(3, 49, 3), empty(3, 64)],
    "aclnnIndexSelect": [half(6, 2048), 0, index(5, 0, 2), empty(3, 2048)],
    "aclnnInplaceIndexCopy": [half(96, 128), 0, index(95, 0, 17), half(3, 128)],
    "aclnnPermute": [half(5, 2, 3, 64), (1, 2, 0, 3), empty(2, 3, 5, 64)],
    "aclnnInplaceAdd": [half(4, 3, 40), half(3, 40), 0.7],
    "aclnnInplaceMul": [half(3, 96), half(3, 96)],
    "aclnnInplaceMuls": [half(3, 96), 0.125],
    "aclnnRelu": [half(3, 96), empty(3, 96)],
    "aclnnInplaceRelu": [half(3, 96)],
    "aclnnThreshold": [half(3, 96), 0.25, 0.0, empty(3, 96)],
    "aclnnSilu": [half(3, 96), empty(3, 96)],
    "aclnnGeluV2": [half(3, 96), 1, empty(3, 96)],
    "aclnnSum": [(half(3, 4, 40), half(3, 1, 40)), empty(3, 4, 40)],
    "aclnnInplaceCopy": [empty(3, 96), half(3, 96)],
    "aclnnClampMin": [half(3, 96), 0.0, empty(3, 96)],
    "aclnnInplaceGtScalar": [half(3, 96), 0.25],
}  # fmt: skip
TRANSPOSED = {"aclnnMm": 1}  # the operand that is a transposed view


@pytest.fixture
def device() -> Iterator[AscendDevice]:
    npu = EmulatedNpu() if isinstance(NPU, str) else None
    found = AscendDevice(load_cann() if npu is None else npu.cann)
    yield found
    found.close()
    assert npu is None or npu.left() == []


def placed(device: AscendDevice, value: Any, transposed: bool) -> Any:
    """An argument on the device."""
    if isinstance(value, tuple) and isinstance(value[0], np.ndarray):
        return tuple(placed(device, v, False) for v in value)
    if not isinstance(value, np.ndarray):
        return value
    return device.upload(value.T).transposed if transposed else device.upload(value)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("keep", [False, True])
def test_an_operator_computes_what_it_should(device: AscendDevice, name: str, keep: bool) -> None:
    soc = None if isinstance(NPU, str) else soc_of(NPU.soc)
    if soc is not None and not soc.has(name):
        pytest.skip("the device lacks it, by its documents")
    inputs = CASES[name]
    arguments = [placed(device, v, TRANSPOSED.get(name) == i) for i, v in enumerate(inputs)]
    expected = [v.copy() if isinstance(v, np.ndarray) else v for v in inputs]
    device.repeat = keep
    for _ in range(2 if keep else 1):
        device.run(name, *arguments)
        OPERATORS[name](*expected)
    compared = 0
    for argument, before, after in zip(arguments, inputs, expected, strict=True):
        if isinstance(argument, Tensor) and argument.contiguous and not np.array_equal(before, after):
            assert relative_error(device.read(argument).astype(np.float32), after.astype(np.float32)) < BOUND
            compared += 1
    assert compared


@on_npu
def test_our_kernels_pass_their_self_test() -> None:
    assert not isinstance(NPU, str)
    found = proven_custom_ops(load_cann(), NPU.soc, ascend_ops_folder())
    assert not isinstance(found, str), found


@on_npu
@pytest.mark.parametrize("ffn", ["dense", "sparse"])
@pytest.mark.parametrize(
    "name", [name for name, config in zoo().items() if not (config.post_norms or config.sub_norms)]
)
def test_every_family_agrees_with_the_reference(name: str, ffn: Any) -> None:
    config = zoo()[name]
    if ffn == "sparse" and not config.sparse_ffn:
        pytest.skip("no neuron of the model is ever zero")
    assert not isinstance(NPU, str)
    predictor = make_predictor(config, 24, 0, -0.3) if ffn == "sparse" else None
    arrays, formats, exact = stored(config, "f16")
    ops = proven_custom_ops(load_cann(), NPU.soc, ascend_ops_folder())
    reference = ReferenceExecutor(config, exact, 64, predictor=predictor, ffn=ffn)
    device = AscendDevice(load_cann())
    try:
        setup = ExecutorSetup(config, arrays, formats, block_count=64, max_batch_rows=40, predictor=predictor, ffn=ffn)
        ascend = AscendExecutor(setup, device=device, custom_ops=ops)
        tokens = random_tokens(config, 12)
        found, expected = (run_in_chunks(e, tokens, [9, 1, 1, 1]) for e in (ascend, reference))
        assert np.median(np.abs(found - expected)) < BOUND * expected.std()
    finally:
        device.close()
