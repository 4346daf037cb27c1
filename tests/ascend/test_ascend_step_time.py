"""The modelled step counts the launches that a step makes, and the bytes of what it reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from fake_cann import Npu
from model_zoo import make_batch, zoo
from random_predictors import make_predictor
from test_ascend_executor import executors

from svdengine.kernels.ascend.signatures import LAUNCHES, OPERATORS
from svdengine.tools.ascend_step_time import Sparsity, decode_work, main
from svdengine.tools.random_model import shape_config

ZOO = {name: replace(c, head_dim=16, sliding_window=0, sliding_window_layers=()) for name, c in zoo().items()}
for _refused in ("gemma3", "bitnet", "bitnet_silu"):
    del ZOO[_refused]


@pytest.mark.parametrize("name", ZOO)
def test_launches_are_those_of_a_step(
    make_npu: Callable[..., Npu], launches: dict[str, Callable[..., None]], name: str
) -> None:
    config = ZOO[name]
    predictor = make_predictor(config, 8, 0, 0.0) if config.sparse_ffn else None
    npu = make_npu(launches=launches)
    with executors(npu, config, predictor=predictor) as (ascend, _):
        for ascend.ffn in ("dense", "sparse") if predictor else ("dense",):
            sparsity = Sparsity(8, 0.5, 0.5) if ascend.ffn == "sparse" else None
            for position in range(4):  # the last one repeats what the first recorded, and others proved
                before = len(npu.calls)
                ascend.forward(make_batch([([position + 1], position)], [[0]]))
            made = [c for c in npu.calls[before:] if c in OPERATORS or c in LAUNCHES]
            assert len(made) == decode_work(config, 1, sparsity).launches


def test_bytes_of_the_7b_shape() -> None:
    config = shape_config("llama2-7b", activation="relu")
    dense, sparse = decode_work(config, 0), decode_work(config, 0, Sparsity(256, 0.15, 0.10))
    assert dense.bytes == 32 * (134_217_728 + 270_532_608) + 262_144_000
    assert sparse.bytes == pytest.approx(32 * (134_217_728 + 39_297_024 + 8 * 11008) + 262_144_000, rel=1e-4)
    assert decode_work(config, 1).bytes - dense.bytes == 524_288
    assert (dense.launches, sparse.launches) == (32 * 13 + 7, 32 * 14 + 7)
    assert dense.seconds(1e12, 1e-6) == pytest.approx(dense.bytes / 1e12 + 423e-6)


def test_the_table_says_what_it_is(capsys: Any) -> None:
    main([])
    shown = capsys.readouterr().out
    assert shown.startswith("A model, not a measurement") and shown.count("\n|") == 6
