"""Whatever call of the runtime fails: an error of one line that names it, and everything is given back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from fake_cann import INJECTED, Npu
from model_zoo import make_batch, stored, zoo
from random_predictors import make_predictor

from svdengine.errors import DeviceError
from svdengine.kernels.ascend.attention import FUSED
from svdengine.kernels.ascend.custom_ops import find_kernels
from svdengine.kernels.ascend.device import AscendDevice
from svdengine.kernels.ascend.executor import AscendExecutor
from svdengine.kernels.base_executor import ExecutorSetup

MakeNpu = Callable[..., Npu]
Launches = dict[str, Callable[..., None]]

# One layer with every kind of operator, and heads that the fused attention takes.
CONFIG = replace(
    zoo()["llama_relu_biases"],
    layer_count=1,
    head_dim=16,
    qk_norm=True,
    embedding_scale=2.0,
    vocab_size=64,
    ffn_size=70,
)
PREDICTOR = make_predictor(CONFIG, 8, 0, -0.05)
ARRAYS, FORMATS, _ = stored(CONFIG, "f16")
SPARED = {"aclSetAclOpExecutorRepeatable"}  # a plan that cannot be kept is made anew each time


@contextmanager
def opened(npu: Npu) -> Iterator[AscendExecutor]:
    """An executor as engine/executors.py opens one."""
    device = AscendDevice(npu.cann)
    try:
        setup = ExecutorSetup(
            CONFIG, ARRAYS, FORMATS, block_count=4, max_batch_rows=8, predictor=PREDICTOR, ffn="sparse"
        )
        executor = AscendExecutor(setup, device=device, custom_ops=find_kernels(npu))
    except BaseException:
        device.close()
        raise
    try:
        yield executor
    finally:
        executor.close()


def work(npu: Npu) -> None:
    """A prompt, steps that are planned, kept and repeated, another predictor, and FFNs alone."""
    with opened(npu) as executor:
        executor.forward(make_batch([([1, 2, 3], 0)], [[0]]))
        for position in (3, 4):
            executor.forward(make_batch([([4], position)], [[0]]))
        executor.predictor = None
        executor.ffn = "dense"
        executor.run_ffns(np.zeros((1, CONFIG.hidden_size), np.float32))


def chosen_calls(calls: list[str]) -> list[int]:
    """Of each function, its first call, one in the middle and its last."""
    places: dict[str, list[int]] = {}
    for index, name in enumerate(calls):
        places.setdefault(name, []).append(index)
    return sorted({at[i] for at in places.values() for i in (0, len(at) // 2, -1)})


def test_every_call_may_fail(make_npu: MakeNpu, launches: Launches) -> None:
    sound = make_npu(launches=launches)
    work(sound)
    assert sound.left() == []
    chosen = chosen_calls(sound.calls)
    # Attention has a way round the operator that is tried.
    end = sound.calls.index("memcpy", sound.calls.index(FUSED))
    tried = range(sound.calls.index("aclCreateTensor"), end + 1)
    assert len({sound.calls[i] for i in chosen}) == len(set(sound.calls)) > 50
    for index in chosen:
        name = sound.calls[index]
        npu = make_npu(launches=launches, fail_at=index)
        if name in SPARED or index in tried:
            work(npu)
            continue
        with pytest.raises(DeviceError) as error:
            work(npu)
        assert npu.calls[index] == name
        assert npu.left() == [], (name, index)
        said = str(error.value)
        assert "\n" not in said and "EZ9999: the emulator says why" in said, said
        # Constructors give a null pointer and no code.
        assert name.removesuffix("GetWorkspaceSize") in said.replace("launching ", "aclrtlaunch_"), (name, said)
        assert f"failed with {INJECTED}" in said or "returned nothing" in said, said


def test_an_executor_works_on_after_a_step_that_failed(make_npu: MakeNpu, launches: Launches) -> None:
    batch = make_batch([([1, 2], 0)], [[0]])
    npu = make_npu(launches=launches)
    with opened(npu) as executor:
        expected = executor.forward(batch)
        npu.fail_at = len(npu.calls) + 20
        with pytest.raises(DeviceError):
            executor.forward(batch)
        np.testing.assert_array_equal(executor.forward(batch), expected)


def test_two_executors_do_not_share_their_end(make_npu: MakeNpu, launches: Launches) -> None:
    batch = make_batch([([1, 2], 0)], [[0]])
    npu = make_npu(launches=launches)
    with opened(npu) as first:
        expected = first.forward(batch)
        with opened(npu) as second:
            np.testing.assert_array_equal(second.forward(batch), expected)
        np.testing.assert_array_equal(first.forward(batch), expected)
    assert npu.started == 1
