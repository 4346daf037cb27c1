"""What is told before a conversion is what comes."""

from dataclasses import replace
from pathlib import Path

import pytest
from small_checkpoints import CONFIG, write_hf

from svdengine.converters import convert
from svdengine.converters.forecast import calibration_seconds, forecast
from svdengine.kernels.formats import WEIGHT_FORMATS, WeightFormat


@pytest.mark.parametrize("dtype", [name for name in WEIGHT_FORMATS if name != "ternary"])  # of BitNet alone
def test_the_size_of_the_file(tmp_path: Path, dtype: WeightFormat) -> None:
    convert(write_hf(tmp_path / "hf"), tmp_path / "m.svdp", dtype, down_dtype="q8")
    told = forecast(CONFIG, dtype, down_dtype="q8", predictor=False)
    size = (tmp_path / "m.svdp").stat().st_size
    assert told.file_bytes <= size < told.file_bytes + 20_000  # header and tokenizer
    assert told.memory_bytes > told.file_bytes


def test_sparse_and_dense() -> None:
    sparse = forecast(CONFIG, "q8", cores=2)
    assert sparse.sparse and sparse.why == "its FFNs have the activation relu"
    assert sparse.file_bytes > forecast(CONFIG, "q8", predictor=False).file_bytes
    dense = forecast(replace(CONFIG, activation="silu"), "q8")
    assert not dense.sparse and dense.why.endswith("this model has silu") and dense.calibration_seconds is None


def test_calibration_takes_longer_for_more() -> None:
    large = replace(CONFIG, hidden_size=4096, ffn_size=11008, layer_count=32, vocab_size=32000)
    assert 0 < calibration_seconds(CONFIG, 2) < 5
    assert 10 * 60 < calibration_seconds(large, 2) < 20 * 60
    assert calibration_seconds(large, 2) == 2 * calibration_seconds(large, 4)
