"""Curves of loss against bytes: every kind runs end to end, and stricter thresholds read less."""

from pathlib import Path

import pytest
from tiny_model import write_tiny_model

from svdengine import load
from svdengine.errors import ConversionError
from svdengine.tools.predictor_curves import PRICES, SHARES, Kind, kinds_of, markdown, measure, page

TEXT = "once upon a time there was a user and a system, hello world. what is 2 + 2? the assistant says: 4. " * 10


def test_curves_of_a_small_model(tmp_path: Path) -> None:
    with load(write_tiny_model(tmp_path / "m.svdp"), "reference", "dense") as llm:
        width = llm.config.hidden_size
        found = list(measure(llm, TEXT, [Kind("lowbit", 0, 2), Kind("greedy", width // 2)], 4000, 600))
    assert [one.strictness for one in found] == [*PRICES, *SHARES]
    for curve in (found[:3], found[3:]):
        assert curve[0].bytes_share > curve[-1].bytes_share and curve[0].cost.kl <= curve[-1].cost.kl
        assert all(0 < one.computed <= one.predicted <= 1 for one in curve)
    table = markdown(found).splitlines()
    assert len(table) == 8 and table[2].startswith("| lowbit 2 bits | 0.001 |")
    assert page(found, "m").count("<svg") == 1


def test_names_are_those_of_the_tables() -> None:
    names = [kind.name for kind in kinds_of(576)]
    assert names == ["svd 128", "svd-naive 128", "lowbit 1 bit", "lowbit 2 bits", "svd 64 + 2 bits", "greedy 128"]


def test_a_model_without_zeros_is_refused(tmp_path: Path) -> None:
    with (
        load(write_tiny_model(tmp_path / "m.svdp", activation="silu"), "reference", "dense") as llm,
        pytest.raises(ConversionError, match="no zeros"),
    ):
        next(measure(llm, TEXT, kinds_of(llm.config.hidden_size), 4000))
