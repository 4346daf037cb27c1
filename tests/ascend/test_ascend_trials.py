"""What is tried on the device before it is relied on: repeated plans, the fused attention, deterministic sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fake_operators
import numpy as np
import pytest
from fake_cann import Npu
from model_zoo import make_batch
from test_ascend_executor import FUSABLE, LLAMA, RELU, ZOO, check, executors

from svdengine.kernels.ascend.attention import FUSED
from svdengine.kernels.ascend.device import AscendDevice

MakeNpu = Callable[..., Npu]
STEPS = [5, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("aclnnMm", "llama"),
        ("aclnnEmbedding", "llama"),
        ("aclnnIndexSelect", "llama"),
        ("aclnnRmsNorm", "llama"),
        ("aclnnAddRmsNorm", "llama"),
        ("aclnnRotaryPositionEmbedding", "llama"),
        ("aclnnInplaceIndexCopy", "llama"),
        ("aclnnInplaceMul", "llama"),
        ("aclnnInplaceAdd", "opt"),
        ("aclnnLayerNorm", "opt"),
        ("aclnnRelu", "opt"),
    ],
)
def test_an_operator_that_is_stale_when_it_runs_again_is_planned_anew(
    make_npu: MakeNpu, capsys: Any, name: str, model: str
) -> None:
    """Its return codes say that all is well. No step shows it, not even the first that repeats it."""
    check(make_npu(stale=frozenset([name])), ZOO[model], STEPS)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and f"{name} gives other results when its plan runs again" in said[0]


def test_plans_that_have_proven_right_are_not_made_again(make_npu: MakeNpu, capsys: Any) -> None:
    npu = make_npu()
    with executors(npu, LLAMA) as (ascend, _):
        planned = []
        for position in range(5):
            before = len(npu.calls)
            ascend.forward(make_batch([([position + 3], position)], [[0]]))
            planned.append(npu.calls[before:].count("aclnnMmGetWorkspaceSize"))
    assert planned[0] == planned[1] > 0 and planned[2:] == [0, 0, 0]
    assert capsys.readouterr().err == ""


def test_a_plan_is_not_believed_on_the_data_that_it_was_made_on(make_npu: MakeNpu) -> None:
    npu = make_npu(stale=frozenset(["aclnnMm"]))
    with executors(npu, LLAMA) as (ascend, reference):
        for token in (3, 3, 3, 7):
            batch = make_batch([([token], 0)], [[0]])
            found, expected = ascend.forward(batch), reference.forward(batch)
            assert np.abs(found - expected).max() < 4e-3 * np.abs(expected).max()


@pytest.mark.parametrize("wrong", [False, True])
def test_fused_attention_that_does_not_work_is_done_without(
    make_npu: MakeNpu, monkeypatch: pytest.MonkeyPatch, capsys: Any, wrong: bool
) -> None:
    npu = make_npu(unsupported=frozenset() if wrong else frozenset([FUSED]))
    if wrong:
        monkeypatch.setitem(fake_operators.OPERATORS, FUSED, lambda *arguments: arguments[-1].fill(0))
    check(npu, FUSABLE, STEPS)
    assert npu.calls.count("aclnnSoftmax") == len(STEPS) * FUSABLE.layer_count
    (said,) = capsys.readouterr().err.splitlines()
    reason = "gives wrong results on this device" if wrong else "GetWorkspaceSize failed with 561003 (no kernel"
    assert said.startswith("attention runs in several operators") and reason in said


def test_sums_are_added_up_in_one_order_where_cann_can(make_npu: MakeNpu) -> None:
    npu = make_npu()
    device = AscendDevice(npu.cann)
    assert len(npu.deterministic) == 1
    device.close()
    old = make_npu()
    del old.acl.rt.ctx_set_sys_param_opt
    check(old, RELU, [2, 1])


def test_attention_in_several_operators_keeps_no_plan_of_a_length(make_npu: MakeNpu) -> None:
    npu = make_npu(unsupported=frozenset([FUSED]))
    alive = []
    with executors(npu, FUSABLE) as (ascend, _):
        for position in range(8):
            ascend.forward(make_batch([([position + 3], position)], [[0]]))
            alive.append(sum(handle.alive for handle in npu.handles.values() if handle.kind == "Executor"))
    assert alive[3:] == alive[3:4] * 5


def test_a_step_copies_by_pinned_memory(make_npu: MakeNpu) -> None:
    npu = make_npu()
    with executors(npu, LLAMA) as (ascend, _):
        npu.staged.clear()
        for position in range(3):
            ascend.forward(make_batch([([position + 3], position)], [[0]]))
        assert npu.staged == []
    device = AscendDevice(npu.cann)
    large = np.arange(1 << 19, dtype=np.float32)  # 2 MiB
    np.testing.assert_array_equal(device.read(device.upload(large)), large)
    assert npu.staged == [large.nbytes] * 2
    device.close()
