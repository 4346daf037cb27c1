"""Converting to a wanted size: the file has it, its formats are those chosen, and what cannot be met is said."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from small_checkpoints import CONFIG, write_hf

from svdengine.commands.conversion import Wanted, working_bytes
from svdengine.commands.convert import command as convert_command
from svdengine.converters.format_trials import divergence
from svdengine.converters.sized_conversion import SizedModel, Wish, convert_to_size, matrix_sizes
from svdengine.converters.weight_calibration import WeightCalibration
from svdengine.errors import ConversionError
from svdengine.files.model_file import read_model_file
from svdengine.files.tensor_writer import PAGE
from svdengine.kernels.formats import gather_parts
from svdengine.models.tensors import tensor_specs

SIZES = matrix_sizes(CONFIG)
LARGEST_STEP = max(of["q8"] - of["q6"] for of in SIZES.values())


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SVDENGINE_DEVICE", "reference")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 8, encoding="utf-8")
    return write_hf(tmp_path / "hf")


def made(checkpoint: Path, wish: Wish) -> tuple[SizedModel, Path]:
    output = checkpoint.parent / "m.svdp"
    calibration = WeightCalibration(text=(checkpoint.parent / "text.txt",))
    return convert_to_size(checkpoint, output, wish, calibration=calibration), output


def convert(checkpoint: Path, *options: str) -> Result:
    paths = [str(checkpoint), "-o", str(checkpoint.parent / "m.svdp"), "--text", str(checkpoint.parent / "text.txt")]
    return CliRunner().invoke(convert_command, [*paths, "--no-check", *options], catch_exceptions=False)


def test_a_file_of_a_wanted_size(checkpoint: Path) -> None:
    size = 300_000
    result, output = made(checkpoint, Wish(size=size))
    found = output.stat().st_size
    assert size - LARGEST_STEP - 4 * PAGE < found <= size
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["hf", "m.svdp", "text.txt"]
    assert len(set(result.choice.formats.values())) > 1
    with read_model_file(output) as file:
        assert file.formats == result.choice.formats
        stored = {name: sum(part.nbytes for part in gather_parts(file.arrays, name).values()) for name in SIZES}
        assert stored == {name: SIZES[name][one] for name, one in result.choice.formats.items()}
        provenance = json.loads(file.metadata["provenance"])
    assert (provenance["dtype"], provenance["size"]) == ("mixed", size) and provenance["calibrated_tokens"] > 256
    # What is chosen is near what is measured, and far better than all in the smallest format.
    assert result.loss == pytest.approx(result.base + result.choice.loss, rel=0.3)
    assert result.loss < 0.3 * sum(options[-1].loss for options in result.options.values())
    for options in result.options.values():
        base, six, four = options
        assert base.loss == 0 and six.loss < four.loss


def test_bits_a_weight(checkpoint: Path) -> None:
    result, output = made(checkpoint, Wish(bits=8.0))
    weights = sum(math.prod(spec.shape) for spec in tensor_specs(CONFIG) if spec.matrix)
    with read_model_file(output) as file:
        stored = sum(part.nbytes for name in SIZES for part in gather_parts(file.arrays, name).values())
    assert stored == result.choice.size
    assert 8.0 - 8 * LARGEST_STEP / weights < 8 * stored / weights <= 8.0


def test_with_room_for_all_the_best_is_taken(checkpoint: Path) -> None:
    result, output = made(checkpoint, Wish(bits=30.0))
    assert result.choice.loss == sum(min(option.loss for option in options) for options in result.options.values())
    assert result.choice.loss <= 0
    with read_model_file(output) as file:
        assert file.formats == result.choice.formats


@pytest.mark.parametrize("option", ["--bits", "--size"])
def test_too_little_names_the_smallest(checkpoint: Path, option: str) -> None:
    with pytest.raises(ConversionError, match=r"fewest|smallest") as error:
        convert(checkpoint, "--predictor", "none", option, "1")
    assert re.search(r"the most|the largest of use", str(error.value))
    assert not (checkpoint.parent / "m.svdp").exists()
    smallest = re.search(r": (?:the smallest file has )?(\d[\d.]*[KM]?)", str(error.value))
    assert smallest is not None
    done = convert(checkpoint, "--predictor", "none", option, smallest[1])
    assert done.exit_code == 0, done.output
    with read_model_file(checkpoint.parent / "m.svdp") as file:
        assert set(file.formats.values()) == {"q4"}


def test_the_predictor_counts(checkpoint: Path) -> None:
    text = (checkpoint.parent / "text.txt").read_text(encoding="utf-8")
    (checkpoint.parent / "text.txt").write_text(4 * text, encoding="utf-8")
    done = convert(checkpoint, "--size", "360K", "--calibration", "recall", "--verbose")
    assert done.exit_code == 0, done.output
    assert "mixed formats a file of" in done.stderr
    output = checkpoint.parent / "m.svdp"
    assert 0.85 * (360 << 10) < output.stat().st_size <= 360 << 10
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line[:1] == "|"]
    assert {row[0] for row in rows[2:]} == set(SIZES)
    rates = [float(row[-1]) for row in rows[2:]]
    assert rates == sorted(rates, reverse=True)
    with read_model_file(output) as file:
        assert {row[0]: row[1] for row in rows[2:]} == file.formats
        assert "predictor" in file.metadata


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--bits", "5", "--size", "95M"], "--bits and --size say different things"),
        (["--bits", "5", "--dtype", "q8"], "--bits and --dtype say different things"),
        (["--size", "1M", "--embedding-dtype", "q4", "--down-dtype", "q8"], "--size, --embedding-dtype and --down"),
        (["--bits", "5", "--quick"], "--quick does not read the text"),
        (["--bits", "nan"], "expected a finite number"),
        (["--size", "much"], "expected a size such as"),
    ],
)
def test_wrong_usage(checkpoint: Path, options: list[str], what: str) -> None:
    done = convert(checkpoint, *options)
    assert done.exit_code == 2 and what in done.stderr


def test_conversions_of_several_sizes_have_names_of_their_own() -> None:
    assert Wanted(size=95 << 20).variant(None) == "95M"
    assert Wanted(bits=4.75, activation="relu").variant("lowbit") == "4.75-bits-relu-lowbit"
    assert working_bytes(CONFIG, Wanted(dtype="q4")) == 0
    assert working_bytes(CONFIG, Wanted(bits=5.0)) > sum(of["q8"] + of["q6"] + of["q4"] for of in SIZES.values())


def test_divergence() -> None:
    p, q = (
        np.array([[0.5, 0.25, 0.25], [1 / 3] * 3], np.float32),
        np.array([[0.25, 0.5, 0.25], [1 / 3] * 3], np.float32),
    )
    assert divergence(np.log(p), np.log(q)) == pytest.approx(0.25 * math.log(2), rel=1e-5)
    assert divergence(np.log(p), np.log(p)) == 0
    assert divergence(np.log(p), np.full_like(p, np.nan)) == math.inf
