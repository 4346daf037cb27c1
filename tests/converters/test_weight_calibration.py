"""Quantising with what the inputs are: the layers that it runs are the model's, and conversion uses it."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from model_zoo import make_batch, random_tokens, random_weights, zoo
from numpy.typing import NDArray
from small_checkpoints import write_hf

from svdengine.commands.convert import command as convert_command
from svdengine.converters.conversion import calibration_windows, convert
from svdengine.converters.hf_checkpoint import HfCheckpoint
from svdengine.converters.weight_calibration import EMBEDDINGS, Quantizer, WeightCalibration
from svdengine.errors import ConversionError
from svdengine.files.model_file import read_model_file
from svdengine.files.model_writer import NO_TOKENIZER
from svdengine.kernels.batch import BLOCK_SIZE
from svdengine.kernels.formats import WeightFormat, dequantize, quantize
from svdengine.kernels.reference import ReferenceExecutor
from svdengine.models.config import ModelConfig
from svdengine.models.tensors import tensor_specs

Array = NDArray[np.float32]


class Recording(Quantizer):
    """Keeps what the output projection reads."""

    def _round(self, names: Sequence[str], weights: dict[str, Array], layer: int, inputs: Array | None) -> None:
        super()._round(names, weights, layer, inputs)
        if names[0] in EMBEDDINGS and inputs is not None:
            vars(self)["last"] = inputs


def quantised(
    config: ModelConfig, weight_format: WeightFormat, windows: list[list[int]]
) -> tuple[dict[str, Array], Recording]:
    """The weights of a random model after quantisation, and what did it."""
    weights = random_weights(config)
    result = {name: np.full_like(w, np.nan) for name, w in weights.items()}
    stacked = {spec.name: spec.stacked for spec in tensor_specs(config)}
    formats: dict[str, WeightFormat] = {spec.name: weight_format for spec in tensor_specs(config) if spec.matrix}
    formats |= {"position_embedding": "f32"} if config.learned_positions else {}

    def place(name: str, layer: int, array: Array) -> None:
        (result[name][layer : layer + 1] if stacked[name] else result[name][None])[...] = array

    quantizer = Recording(
        config=config,
        formats=formats,
        read=lambda name, layer: (weights[name][layer] if stacked[name] else weights[name]).copy(),
        write=place,
        write_parts=lambda name, layer, parts: place(
            name, layer, dequantize(parts, formats[name], weights[name].shape[-1])
        ),
    )
    quantizer.run(windows)
    return result, quantizer


def logits(config: ModelConfig, weights: dict[str, Array], window: list[int]) -> Array:
    blocks = list(range(-(-len(window) // BLOCK_SIZE)))
    executor = ReferenceExecutor(config, weights, block_count=len(blocks), max_batch_rows=len(window))
    return executor.forward(make_batch([(window, 0)], [blocks]))


@pytest.mark.parametrize("name", zoo())
def test_layers_are_those_of_the_reference(name: str) -> None:
    config = zoo()[name]
    windows = [random_tokens(config, 21, 1), random_tokens(config, 2, 2), random_tokens(config, 33, 3)]
    written, quantizer = quantised(config, "f32", windows)
    weights = random_weights(config)
    for tensor, array in written.items():
        assert np.array_equal(array, weights[tensor]), tensor
    head = weights["embedding" if config.tied_embeddings else "lm_head"]
    found = vars(quantizer)["last"] @ head.T * np.float32(config.logit_scale)
    start = 0
    for window in windows:
        expected = logits(config, weights, window)[-1]
        np.testing.assert_allclose(found[start + len(window) - 1], expected, rtol=2e-3, atol=2e-3)
        start += len(window)


@pytest.mark.parametrize("name", ["llama", "llama_relu_tied", "falcon_7b_relu"])
def test_it_beats_rounding_to_nearest(name: str) -> None:
    config = zoo()[name]
    windows = [random_tokens(config, 64, seed) for seed in range(60)]
    exact = random_weights(config)
    fed_back, _ = quantised(config, "q4", windows)
    nearest = dict(exact)
    for spec in tensor_specs(config):
        if spec.matrix:
            flat = exact[spec.name].reshape(-1, spec.shape[-1])
            nearest[spec.name] = dequantize(quantize(flat, "q4"), "q4", spec.shape[-1]).reshape(spec.shape)
    error = {"fed_back": 0.0, "nearest": 0.0}
    for seed in range(100, 104):  # texts that it did not see
        window = random_tokens(config, 64, seed)
        expected = logits(config, exact, window)
        for kind, weights in (("fed_back", fed_back), ("nearest", nearest)):
            error[kind] += float(np.square(logits(config, weights, window) - expected).sum())
    assert error["fed_back"] < 0.8 * error["nearest"]


def test_inputs_that_are_not_finite_are_refused() -> None:
    config = zoo()["llama"]
    windows = [random_tokens(config, 20)]
    weights = random_weights(config)
    weights["ffn_norm.weight"][1] = np.inf
    stacked = {spec.name: spec.stacked for spec in tensor_specs(config)}
    quantizer = Quantizer(
        config,
        {spec.name: "q4" for spec in tensor_specs(config) if spec.matrix},
        lambda name, layer: weights[name][layer] if stacked[name] else weights[name],
        lambda name, layer, array: None,
        lambda name, layer, parts: None,
    )
    with np.errstate(all="ignore"), pytest.raises(ConversionError, match="layer 1: what gate reads holds NaN"):
        quantizer.run(windows)


def run(folder: Path, *options: str) -> tuple[dict[str, NDArray[Any]], dict[str, Any], str]:
    """Arrays and provenance of what the command makes of a small checkpoint, and what it says."""
    output = folder / "m.svdp"
    arguments = [str(folder / "hf"), "-o", str(output), "--predictor", "none", *options]
    done = CliRunner().invoke(convert_command, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    with read_model_file(output) as file:
        arrays = {name: array.copy() for name, array in file.arrays.items()}
        return arrays, json.loads(file.metadata["provenance"]), done.stderr


def test_convert_calibrates_by_default(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 100, encoding="utf-8")
    quick, provenance, _ = run(tmp_path, "--dtype", "q4", "--quick")
    assert "calibrated_tokens" not in provenance
    convert(tmp_path / "hf", tmp_path / "plain.svdp", "q4")
    with read_model_file(tmp_path / "plain.svdp") as plain:
        assert all(np.array_equal(plain.arrays[name], array) for name, array in quick.items())
    options = ("--dtype", "q4", "--embedding-dtype", "q8", "--text", str(text))
    calibrated, provenance, _ = run(tmp_path, *options)
    assert provenance["calibrated_tokens"] > 256
    same = {name for name, array in quick.items() if np.array_equal(array, calibrated[name])}
    assert {"embedding", "attention_norm.weight", "output_norm.weight"} <= same  # of other formats
    assert not {"q", "k", "v", "o", "gate", "up", "down_T"} & same
    again, _, _ = run(tmp_path, *options)
    assert all(np.array_equal(again[name], array) for name, array in calibrated.items())
    _, provenance, _ = run(tmp_path, "--dtype", "q8")
    assert "calibrated_tokens" not in provenance


def test_convert_calibrates_on_text_of_the_machine(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "m.svdp", "q6", calibration=WeightCalibration(tokens=600))
    with read_model_file(tmp_path / "m.svdp") as file:
        assert json.loads(file.metadata["provenance"])["calibrated_tokens"] >= 600


def test_verbose_prints_what_rounding_changed(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 100, encoding="utf-8")
    arguments = [str(tmp_path / "hf"), "-o", str(tmp_path / "m.svdp"), "--predictor", "none", "--text", str(text)]
    done = CliRunner().invoke(convert_command, [*arguments, "--dtype", "q4", "--verbose"], catch_exceptions=False)
    rows = [line.split(" | ") for line in done.stdout.splitlines()[2:]]
    assert {row[0].removeprefix("| ") for row in rows} == {"q", "k", "v", "o", "gate", "up", "down_T", "lm_head"}
    shares = [float(row[3].rstrip("%")) for row in rows]
    assert shares == sorted(shares, reverse=True) and all(0 < share < 5 for share in shares)


def test_a_tokenizer_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    config = zoo()["llama"]
    real = HfCheckpoint(write_hf(tmp_path / "hf")).tokenizer  # of more tokens than the model knows
    for tokenizer, what in ((NO_TOKENIZER, "has no tokenizer"), (real, "does not fit")):
        checkpoint: Any = SimpleNamespace(path=tmp_path, config=config, tokenizer=tokenizer)
        with pytest.raises(ConversionError, match=f"{what}.*--quick"):
            calibration_windows(checkpoint, WeightCalibration(tokens=256))
