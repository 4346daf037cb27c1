"""What a calibrated q4 model has in more than four bits."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from small_checkpoints import CONFIG, write_hf

from svdengine.commands.conversion import Wanted, forecast_of
from svdengine.commands.convert import command
from svdengine.converters.conversion import convert
from svdengine.converters.default_formats import calibrated_formats
from svdengine.converters.weight_calibration import WeightCalibration
from svdengine.files.model_file import read_model_file
from svdengine.files.model_writer import weight_bytes
from svdengine.kernels.formats import WeightFormat

BALANCED = replace(CONFIG, vocab_size=3 * CONFIG.ffn_size)  # rows of embedding and output are those of the down's


def test_six_bits_for_both_where_they_are_as_large() -> None:
    assert weight_bytes(BALANCED, "q4", "q6", "q6") <= weight_bytes(BALANCED, "q4")
    assert calibrated_formats(BALANCED, "q4", None, None) == ("q6", "q6")


def test_a_model_that_would_grow_keeps_eight_and_four() -> None:
    deep = replace(BALANCED, layer_count=32)
    assert weight_bytes(deep, "q4", "q6", "q6") > 1.05 * weight_bytes(deep, "q4")
    assert calibrated_formats(deep, "q4", None, None) == (None, None)


@pytest.mark.parametrize(
    ("dtype", "embedding", "down"),
    [("q4", "q8", None), ("q4", None, "q4"), ("q4", "q4", "q8"), ("q6", None, None), ("q8", None, None)],
)
def test_what_was_said_stands(dtype: WeightFormat, embedding: WeightFormat, down: WeightFormat) -> None:
    assert calibrated_formats(BALANCED, dtype, embedding, down) == (embedding, down)


@pytest.mark.parametrize(
    ("options", "embedding", "down"),
    [((), "q6", "q6"), (("--down-dtype", "q4"), "q8", "q4"), (("--quick",), "q8", "q4")],
)
def test_what_the_command_makes_is_what_it_foretells(
    tmp_path: Path, options: tuple[str, ...], embedding: str, down: str
) -> None:
    text, output = tmp_path / "text.txt", tmp_path / "m.svdp"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 100, encoding="utf-8")
    source = str(write_hf(tmp_path / "hf"))
    given = [source, "-o", str(output), "--dtype", "q4", "--predictor", "none", "--text", str(text), *options]
    CliRunner().invoke(command, given, catch_exceptions=False)
    with read_model_file(output) as file:
        assert (file.formats["embedding"], file.formats["down_T"], file.formats["up"]) == (embedding, down, "q4")
        assert file.formats["lm_head"] == embedding
    wanted = Wanted(
        "q4", kind="none", down_dtype="q4" if "--down-dtype" in options else None, quick="--quick" in options
    )
    told = forecast_of(CONFIG, wanted).file_bytes
    assert told <= output.stat().st_size < told + 20_000  # header and tokenizer


def test_the_library_does_so_too(tmp_path: Path) -> None:
    convert(write_hf(tmp_path / "hf"), tmp_path / "m.svdp", "q4", calibration=WeightCalibration(tokens=300))
    with read_model_file(tmp_path / "m.svdp") as file:
        assert (file.formats["embedding"], file.formats["down_T"]) == ("q6", "q6")
        assert json.loads(file.metadata["provenance"])["down_dtype"] == "q6"
