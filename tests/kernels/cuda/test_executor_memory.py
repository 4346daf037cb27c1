"""What a CUDA executor takes of a device, and gives back: memory, launches, kernels and KV blocks."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from model_zoo import make_batch, random_tokens, relative_error
from numpy.typing import NDArray
from random_predictors import make_predictor
from test_executor import BOUND, LLAMA, RELU, ZOO, check, executors, small_blocks, use_the_library_from

from svdengine.kernels.cuda.device import SimulatedDevice
from svdengine.kernels.cuda.half_copies import copy_items
from svdengine.kernels.cuda.intrinsics import SIMULATED
from svdengine.kernels.cuda.workspace import Sizes
from svdengine.kernels.executor import BlockStore, Choice
from svdengine.kernels.formats import WeightFormat
from svdengine.models import tensor_specs

__all__ = ["small_blocks"]  # a fixture: fewer threads in the simulator


def test_a_step_of_likeliest_tokens_launches_less(device: Any) -> None:
    if not isinstance(device, SimulatedDevice):
        pytest.skip("only the simulator counts launches")
    with executors(device, LLAMA) as (cuda, _):
        batch, counts = make_batch([([1], 0)], [[0]]), []
        for temperature in (0.0, 1.0):
            before = device.launches
            cuda.forward_and_sample(batch, [Choice(temperature)])
            counts.append(device.launches - before)
        assert counts[1] - counts[0] == 2


def test_what_an_executor_closes_it_no_longer_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """CuPy gives back only what nobody refers to."""
    if not SIMULATED:
        pytest.skip("arrays of the simulator are watched")
    arrays: list[weakref.ref[NDArray]] = []
    waited: list[bool] = []

    class Watched(SimulatedDevice):
        def zeros(self, size: int, dtype: Any) -> Any:
            found = super().zeros(size, dtype)
            arrays.append(weakref.ref(found))
            return found

        def synchronize(self) -> None:
            waited.append(True)

        def close(self) -> None:
            assert waited and not any(array() is not None for array in arrays)
            arrays.clear()

    with executors(Watched(), LLAMA) as (cuda, _):
        for _ in range(3):  # graphs hold arrays too
            cuda.forward(make_batch([([1], 0)], [[0]]))
        assert len(arrays) > 20
        waited.clear()
    assert not arrays


def test_kv_blocks_are_taken_out_and_put_back(device: Any) -> None:
    config = replace(LLAMA, layer_count=2)
    tokens = random_tokens(config, 5)
    with executors(device, config) as (cuda, reference):
        assert isinstance(cuda, BlockStore)
        cuda.forward(make_batch([(tokens[:4], 0)], [[3]]))
        reference.forward(make_batch([(tokens[:4], 0)], [[3]]))
        saved = cuda.read_blocks([3, 1])
        assert saved.shape == (2, 2, 2, 16, config.kv_head_count, config.head_dim) and saved.dtype == np.float32
        assert relative_error(saved[0], reference.read_blocks([3])[0]) < BOUND and not saved[1].any()
        cuda.forward(make_batch([(random_tokens(config, 4, seed=9), 0)], [[3]]))
        cuda.write_blocks([5, 0], saved)
        found = cuda.forward(make_batch([(tokens[4:], 4)], [[5]]))
        expected = reference.forward(make_batch([(tokens[4:], 4)], [[3]]))
        assert relative_error(found, expected) < BOUND
        for wrong in (saved[:1], saved.astype(np.float16)):
            with pytest.raises(ValueError, match="found blocks of"):
                cuda.write_blocks([5, 0], wrong)


@pytest.mark.parametrize("weight_format", ["f16", "f32", "q8"])
def test_copies_are_as_large_as_the_formats_need(weight_format: WeightFormat) -> None:
    config = replace(ZOO["llama"], vocab_size=5000, hidden_size=128, ffn_size=320)
    sizes = Sizes.of(config, 64, 48)
    formats = {spec.name: weight_format for spec in tensor_specs(config) if spec.matrix}
    weights, x = copy_items(config, formats, sizes)
    # Gate and up, which lie below each other, are the largest that is copied; the head comes in slices.
    assert weights == (2 * 320 * 128 if weight_format == "q8" else 0)
    assert x == (0 if weight_format == "f32" else 64 * 320)
    split, _ = copy_items(config, formats, sizes, split=True)
    assert split == 2 * 320 * 128
    only_head = {**dict.fromkeys(formats, "f16"), "lm_head": "q8", "embedding": "q8"}
    assert copy_items(config, only_head, sizes)[0] == 320 * 128


def test_the_head_is_multiplied_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    if not SIMULATED:
        pytest.skip("the simulator's library stands for cuBLAS")
    use_the_library_from(2, monkeypatch)
    rows: list[int] = []

    class Counting(SimulatedDevice):
        def gemm(self, weights: Any, x: Any, y: Any, gemm: Any) -> None:
            rows.append(gemm.rows)
            super().gemm(weights, x, y, gemm)

    config = replace(LLAMA, vocab_size=101)
    check(Counting(has_blas=True), config, [3], 3e-3, weight_format="q8")
    assert rows[-3:] == [36, 36, 29] and sum(rows[-3:]) == 101


def test_a_step_waits_before_it_writes_what_the_one_before_may_still_read(
    device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[int] = []
    with executors(device, LLAMA) as (cuda, _):
        prompt = make_batch([([1, 2], 0)], [[0]])
        monkeypatch.setattr(device, "synchronize", lambda: waited.append(1))
        cuda.forward(replace(prompt, logit_rows=np.zeros(0, np.int32)))
        assert not waited
        cuda.forward(prompt)
        assert waited == [1]
        cuda.forward(prompt)
        assert waited == [1]  # its logits had come
        monkeypatch.undo()


def test_kernels_of_later_steps_are_made_at_the_start() -> None:
    if not SIMULATED:
        pytest.skip("the simulator notes what was prepared")
    device, launched = SimulatedDevice(has_blas=True), set()
    run = device._run
    device._run = lambda kernel, *rest: (launched.add(kernel.name), run(kernel, *rest))[1]  # type: ignore[method-assign]
    predictor = make_predictor(RELU, 8, 0, -1e9)
    with executors(device, RELU, "q8", predictor=predictor, ffn="sparse") as (cuda, _):
        assert not launched
        for n in (1, 2, 3, 9):
            batch = make_batch([(random_tokens(RELU, n), 0)], [[0, 1, 2]])
            cuda.forward_and_sample(batch, [Choice(1.0)] * n)
    assert launched and launched <= device.prepared
