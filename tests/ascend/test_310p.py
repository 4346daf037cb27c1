"""The 310P of the Atlas inference series: the kernels as they are compiled for it, and sparse models that run on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fake_cann import Npu
from fake_operators import NOT_ON_310P
from ffn_case import add_list, capacity_of, ffn_inputs, launch_ffn, launch_score, make_predictor, score_inputs
from host_kernels import Script, compile_host, compile_library, need_compiler
from model_zoo import make_batch, random_tokens, relative_error, run_in_chunks, zoo
from random_predictors import make_predictor as make_model_predictor
from test_ascend_executor import BOUND, SPARSE, executors
from test_conditional_ffn import FAMILIES, check, decided, outputs, sized

from svdengine.errors import DeviceError
from svdengine.kernels.ascend.availability import find_npu
from svdengine.kernels.ascend.custom_ops import find_kernels
from svdengine.kernels.ascend.device import AscendDevice
from svdengine.kernels.ascend.self_test import failing_kernel
from svdengine.kernels.ascend.signatures import OPERATORS
from svdengine.kernels.ascend.soc import ATLAS_310P, ATLAS_A2_A3, soc_of
from svdengine.kernels.ascend.substitutes import USED
from svdengine.kernels.predictor import scores

SOC = "Ascend310P3"
CORES = 8
SLACK = 64  # of the lists, as sparse.py has it
MakeNpu = Callable[..., Npu]
Launches = dict[str, Callable[..., None]]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("blocks", [1, 3, CORES])
def test_the_ffn_is_that_of_the_reference(host_kernels_310p: Path, name: str, blocks: int) -> None:
    inputs = ffn_inputs(sized(name, 700, 90))
    predictor = decided(make_predictor(700, 90, 40), inputs.x, shift=0.1)
    script = Script(host_kernels_310p, SLACK)
    launch_score(script, score_inputs(predictor, inputs.x, shift=0.1), blocks)
    launch_ffn(script, inputs, blocks, blocks, order=1)
    check(outputs(script.run()), inputs, np.flatnonzero(scores(predictor, inputs.x[None], 0.1)[0] > 0))


@pytest.mark.parametrize(("neurons", "hidden"), [(1, 1), (63, 63), (65, 65), (1150, 70), (150, 577), (90, 2049)])
@pytest.mark.parametrize("blocks", [1, CORES])
def test_odd_sizes(host_kernels_310p: Path, neurons: int, hidden: int, blocks: int) -> None:
    """Copies of whole pieces of 32 bytes stay within what the host allocates, and no block disturbs another."""
    inputs = ffn_inputs(sized("llama_relu_biases", neurons, hidden))
    predictor = decided(make_predictor(neurons, hidden, 33), inputs.x)
    script = Script(host_kernels_310p, SLACK)
    launch_score(script, score_inputs(predictor, inputs.x), blocks)
    launch_ffn(script, inputs, blocks, blocks)
    check(outputs(script.run()), inputs, np.flatnonzero(scores(predictor, inputs.x[None])[0] > 0))


def test_a_full_segment_needs_its_slack(host_kernels_310p: Path) -> None:
    """Odd parts of a chunk fill a segment to its end: the last copy reaches beyond it."""
    inputs = ffn_inputs(sized("llama_relu_tied", 1000, 70))
    inputs.weights["gate"][::3] *= -1
    script = Script(host_kernels_310p, 0)
    add_list(script, "predicted", 1000, 1)
    counts, lists = np.zeros((1, 8), np.int32), np.full((1, capacity_of(script, 1000, 1)), -1, np.int32)
    counts[0, 0], lists[0, :1000] = 1000, np.arange(1000)
    script.buffer("predicted_counts", counts)
    script.buffer("predicted", lists)
    launch_ffn(script, inputs, 1, 1)
    assert script.execute().returncode != 0


def test_the_kernels_for_a_910b_do_not_compile_for_it(tmp_path: Path) -> None:
    """The model of the device knows what it lacks."""
    need_compiler()
    source = tmp_path / "other.cpp"
    source.write_text(
        '#include "kernel_operator.h"\n'
        "void f(AscendC::LocalTensor<int32_t>& to) { AscendC::CreateVecIndex(to, int32_t{0}, 64u); }\n"
    )
    compile_library(source, tmp_path)
    with pytest.raises(AssertionError, match="CreateVecIndex"):
        compile_library(source, tmp_path, "-DSVD_310P")
    with pytest.raises(AssertionError, match="DataCopyPad"):
        source.write_text(
            '#include "kernel_operator.h"\n'
            "void f(AscendC::GlobalTensor<float>& to, AscendC::LocalTensor<float>& from)\n"
            "{ AscendC::DataCopyPad(to, from, AscendC::DataCopyExtParams{1, 4, 0, 0, 0}); }\n"
        )
        compile_host(source, tmp_path, "-DSVD_310P")


def test_the_kernels_pass_their_self_test(make_npu: MakeNpu, launches_310p: Launches) -> None:
    npu = make_npu(soc=SOC, vector_cores=CORES, launches=launches_310p)
    assert failing_kernel(npu.cann, find_kernels(npu)) is None


@pytest.mark.parametrize("name", SPARSE)
def test_predicted_neurons_are_those_of_the_reference(make_npu: MakeNpu, launches_310p: Launches, name: str) -> None:
    config = SPARSE[name]
    npu = make_npu(soc=SOC, vector_cores=CORES, launches=launches_310p)
    predictor = make_model_predictor(config, 24, 0, -0.05)
    tokens = random_tokens(config, 12)
    with executors(npu, config, predictor=predictor, ffn="sparse") as (ascend, reference):
        found, expected = (run_in_chunks(e, tokens, [6, 1, 1, 4]) for e in (ascend, reference))
        assert np.median(np.abs(found - expected)) < BOUND * expected.std()
        counts, wanted = ascend.neuron_counts(), reference.neuron_counts()
        assert 0 < counts.predicted < counts.total == wanted.total
        assert abs(counts.predicted - wanted.predicted) <= 5 and abs(counts.active - wanted.active) <= 5
    assert not NOT_ON_310P & {call.removesuffix("GetWorkspaceSize") for call in npu.calls}


def test_only_what_it_has_is_called(make_npu: MakeNpu) -> None:
    """Several sequences at once, odd blocks and a mixed batch; and steps that are repeated."""
    config = zoo()["qwen2"]
    npu = make_npu(soc=SOC)
    with executors(npu, config) as (ascend, reference):
        for executor in (ascend, reference):
            executor.forward(make_batch([([1, 2, 3], 0), ([4] * 17, 0)], [[3, 0], [5, 2]]))
        for position in range(17, 22):
            batch = make_batch([([5], position), ([6], position - 14)], [[5, 2], [3, 0]])
            assert relative_error(ascend.forward(batch), reference.forward(batch)) < BOUND
        before = len(npu.calls)
        ascend.forward(batch)
    called = {call.removesuffix("GetWorkspaceSize") for call in npu.calls[before:]}
    assert "aclnnInplaceCopy" in called and not NOT_ON_310P & called


def test_the_kinds_of_npu_are_told_apart(make_npu: MakeNpu) -> None:
    assert soc_of(SOC) is soc_of("Ascend310P1") is ATLAS_310P
    assert soc_of("Ascend910B3") is soc_of("Ascend910_9362") is ATLAS_A2_A3
    for name in ("Ascend910B", "Ascend910A", "Ascend310B1", "Ascend310"):
        assert soc_of(name) is None
        npu = make_npu(soc=name)
        assert str(find_npu(cann=npu.cann)).startswith(f"{name} is not supported")
        with pytest.raises(DeviceError, match=f"{name} is not supported"):
            AscendDevice(npu.cann)
    found = find_npu(cann=make_npu(soc=SOC, vector_cores=CORES).cann)
    assert not isinstance(found, str) and (found.soc, found.vector_cores) == (SOC, CORES)


def test_what_it_lacks_has_substitutes_that_it_has() -> None:
    assert ATLAS_310P.lacks == NOT_ON_310P == {*USED, "aclnnIncreFlashAttentionV4"}
    used = {name for names in USED.values() for name in names}
    assert used <= set(OPERATORS) and not used & NOT_ON_310P
