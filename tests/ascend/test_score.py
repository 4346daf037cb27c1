"""svd_score lists the neurons that the predictor's definition lists, whatever the sizes and the number of blocks."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ffn_case import ScoreInputs, launch_score, make_predictor, score, score_inputs, with_threshold
from host_kernels import OPS, Script
from numpy.typing import NDArray

from svdengine.kernels.ascend.tiling import (
    CHUNK,
    COUNT_INTS,
    LANES,
    MAX_BLOCKS,
    MAX_COLUMNS,
    UB_BYTES,
    check_shape,
    list_capacity,
    score_ub_bytes,
)
from svdengine.kernels.predictor import scores


def make_x(hidden: int, seed: int = 1) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(hidden, np.float32)


def check(found: NDArray[np.int32], inputs: ScoreInputs) -> None:
    """Ascending, and right wherever the order of a float32 sum cannot decide."""
    expected = inputs.scores
    assert (np.diff(found) > 0).all()
    wrong = np.setxor1d(found, np.flatnonzero(expected > 0))
    assert (np.abs(expected[wrong]) < 1e-5).all()


@pytest.mark.parametrize(
    ("neurons", "rank"),
    [(1, 1), (63, 7), (64, 64), (65, 65), (150, 90), (1000, 100), (1536, 128), (777, 256), (130, 2048), (70, 2100)],
)
@pytest.mark.parametrize("blocks", [1, 7, 48])
def test_lists_of_odd_sizes(host_kernels: Path, neurons: int, rank: int, blocks: int) -> None:
    inputs = score_inputs(make_predictor(neurons, 40, rank), make_x(40))
    check(score(host_kernels, inputs, blocks), inputs)


@pytest.mark.parametrize("blocks", range(1, 49))
def test_every_number_of_blocks_in_any_order(host_kernels: Path, blocks: int) -> None:
    inputs = score_inputs(make_predictor(2000, 90, 70), make_x(90), shift=0.1)
    found = score(host_kernels, inputs, blocks)
    check(found, inputs)
    order = 1 if blocks < 5 else blocks
    np.testing.assert_array_equal(score(host_kernels, inputs, blocks, order), found)


@pytest.mark.parametrize("threshold", [-1e9, 1e9])
@pytest.mark.parametrize("blocks", [1, 5, 40])
def test_empty_and_full_lists(host_kernels: Path, threshold: float, blocks: int) -> None:
    inputs = score_inputs(with_threshold(make_predictor(1150, 90, 70), threshold), make_x(90))
    expected = np.arange(1150 if threshold < 0 else 0)
    np.testing.assert_array_equal(score(host_kernels, inputs, blocks), expected)


def test_a_score_of_zero_is_not_listed(host_kernels: Path) -> None:
    inputs = score_inputs(with_threshold(make_predictor(100, 90, 70), 0.0), np.zeros(90, np.float32))
    assert len(score(host_kernels, inputs, 3)) == 0


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shift", [0.0, 0.7, -0.4])
def test_lists_are_those_of_the_definition(host_kernels: Path, relu: bool, shift: float) -> None:
    predictor = make_predictor(1500, 90, 80, relu=relu)
    x = make_x(90)
    expected = scores(predictor, x[None], shift)[0]
    found = score(host_kernels, score_inputs(predictor, x, shift), 40)
    # Factors and z are rounded to float16 on the device: a score near zero may fall on either side.
    wrong = np.setxor1d(found, np.flatnonzero(expected > 0))
    assert 0.1 < len(found) / 1500 < 0.9 and (np.abs(expected[wrong]) < 4e-3).all()


@pytest.mark.parametrize("rank", [1, 256, MAX_COLUMNS])
def test_the_memory_of_a_block_is_as_computed(host_kernels: Path, rank: int) -> None:
    inputs = score_inputs(make_predictor(70, 30, rank), make_x(30))
    script = Script(host_kernels)
    launch_score(script, inputs, 2)
    script.used()
    assert script.run()[0].item() == score_ub_bytes(rank) <= UB_BYTES


def test_shapes_that_do_not_fit_are_refused() -> None:
    check_shape(MAX_COLUMNS, MAX_COLUMNS, 64)
    for shape in ((MAX_COLUMNS + 1, 8, 40), (90, MAX_COLUMNS + 1, 40), (90, 0, 40), (90, 8, 0), (90, 8, 65)):
        with pytest.raises(ValueError, match="the kernels take 1 to"):
            check_shape(*shape)


def test_the_host_and_the_kernels_have_the_same_constants() -> None:
    constants = dict(re.findall(r"constexpr uint32_t (\w+) = (\d+);", (OPS / "sizes.h").read_text()))
    found = {name: int(constants[name]) for name in ("LANES", "CHUNK", "COUNT_INTS", "MAX_COLUMNS", "MAX_PRODUCERS")}
    assert found == dict(
        LANES=LANES, CHUNK=CHUNK, COUNT_INTS=COUNT_INTS, MAX_COLUMNS=MAX_COLUMNS, MAX_PRODUCERS=MAX_BLOCKS
    )


@pytest.mark.parametrize("blocks", [1, 40, 43, 48])
def test_a_segment_holds_any_share(blocks: int) -> None:
    for neurons in (1, 64, 65, 11008, 13696, 14336):
        units = -(-neurons // 64)
        shares = np.diff(units * np.arange(blocks + 1) // blocks) * 64
        assert shares.max() == list_capacity(neurons, blocks)


@pytest.mark.parametrize(("neurons", "blocks"), [(1, 1), (65, 7), (1500, 40)])
def test_a_low_bit_part_adds_to_the_scores(host_kernels: Path, neurons: int, blocks: int) -> None:
    inputs = score_inputs(make_predictor(neurons, 40, 30), make_x(40), shift=0.2)
    rest = np.random.default_rng(2).standard_normal(neurons).astype(np.float16)
    check(score(host_kernels, replace(inputs, rest=rest), blocks), replace(inputs, rest=rest))
