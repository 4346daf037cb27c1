"""Calibration end to end on a small model: budgets, what the result says of itself, files, and what is refused."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from model_zoo import random_tokens, random_weights, zoo

from svdengine.converters import calibration, calibration_size
from svdengine.converters.calibration import CalibrationOptions, calibrate
from svdengine.converters.end_to_end import LossMeter
from svdengine.converters.output_head import read_output_head
from svdengine.converters.split_text import ONE_KIND, SplitText, is_held_out
from svdengine.errors import ConversionError, ModelFileError
from svdengine.files.model_file import ModelFile, read_model_file
from svdengine.files.model_writer import ModelWriter
from svdengine.files.predictor_file import (
    check_fingerprint,
    model_fingerprint,
    read_predictor,
    write_model_with_predictor,
    write_predictor,
)
from svdengine.files.tensor_writer import TensorWriter
from svdengine.kernels.predictor import Predictor, scores
from svdengine.kernels.reference import ReferenceExecutor, float32_weights
from svdengine.models.config import ModelConfig
from svdengine.models.tensors import tensor_specs

WINDOWS = [random_tokens(zoo()["llama_relu_tied"], 64, seed) for seed in range(10)]


def write_model(path: Path, config: ModelConfig, seed: int = 0) -> ModelFile:
    weights = random_weights(config, seed)
    with ModelWriter(path, config, "q8") as writer:
        for spec in tensor_specs(config):
            for layer in range(config.layer_count if spec.stacked else 1):
                writer.write(spec.name, weights[spec.name][layer] if spec.stacked else weights[spec.name], layer)
    return read_model_file(path)


def executor_of(model_file: ModelFile) -> ReferenceExecutor:
    return ReferenceExecutor(
        model_file.config, float32_weights(model_file.config, model_file.arrays, model_file.formats), block_count=8
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelFile]:
    with write_model(tmp_path_factory.mktemp("model") / "model.svdp", zoo()["llama_relu_tied"]) as model_file:
        yield model_file


@pytest.fixture(scope="module")
def executor(model: ModelFile) -> ReferenceExecutor:
    return executor_of(model)


@pytest.fixture(scope="module")
def predictor(model: ModelFile, executor: ReferenceExecutor) -> Predictor:
    return calibrate(model, executor, WINDOWS, CalibrationOptions(rank=32, max_error=0.01))


def test_a_predictor_says_how_it_was_made(model: ModelFile, predictor: Predictor) -> None:
    about = predictor.about
    assert about["kind"] == "svd" and about["thresholds"] == "error" and about["budget"] == {"max_error": 0.01}
    assert about["fingerprint"] == model_fingerprint(model) and about["tokens"] == 512
    for row, layer in zip(about["table"], predictor.layers, strict=True):
        assert (row["rank"], row["bits"]) == (32, 0) == (layer.rank, layer.residual_bits)
        assert 0.5 < row["auroc"] < 1 and row["relative_error"] == pytest.approx(0.01, rel=0.3)
        assert row["computed_density"] <= min(row["active_density"], row["predicted_density"]) < 1
        assert row["bytes"] > 0 and row["dense_bytes"] > 0
        assert layer.frequency is not None and len(np.unique(layer.frequency)) > 10
        assert layer.frequency.mean(dtype=np.float64) == pytest.approx(row["predicted_density"], abs=1e-3)


def test_the_loss_budget_is_met_and_used(model: ModelFile, executor: ReferenceExecutor) -> None:
    stages: list[str] = []
    options = CalibrationOptions(kind="lowbit", bits=2, max_loss=0.01)
    found = calibrate(model, executor, WINDOWS, options, progress=lambda stage, *_: stages.append(stage))
    held_out = [w for i, w in enumerate(WINDOWS) if is_held_out(i)]
    meter = LossMeter(executor, {ONE_KIND: held_out})
    cost = meter.costs(found)[ONE_KIND]
    assert 0.001 < cost.expected_rise <= 0.01 + 1e-6 and cost.tokens == sum(len(w) - 1 for w in held_out)
    assert found.about["outcome"]["perplexity_rise"] == pytest.approx(cost.expected_rise, abs=1e-5)
    assert found.about["kinds"][ONE_KIND]["kl"] == pytest.approx(cost.kl, abs=1e-5)
    head = read_output_head(model)
    assert head is not None
    (other,) = LossMeter(executor, {ONE_KIND: held_out}, head).costs(found).values()
    assert other.kl == pytest.approx(cost.kl, abs=1e-5) and other.agreement == cost.agreement
    assert all(row["predicted_density"] < 0.9 for row in found.about["table"])
    assert executor.ffn == "dense" and executor.predictor is None
    assert list(dict.fromkeys(stages)) == ["statistics", "layers", "loss"]


def test_a_budget_is_kept_on_a_kind_of_text_that_nothing_saw(model: ModelFile, executor: ReferenceExecutor) -> None:
    """Kinds differ in the tokens that they use. One kind alone, as what a model writes, makes a worse predictor."""
    limit, kinds = 0.01, 8
    size = model.config.vocab_size // kinds

    def windows(kind: int, count: int) -> list[list[int]]:
        random = np.random.default_rng(kind)
        return (kind * size + random.integers(0, size, (count, 64))).tolist()

    unseen = {"unseen": windows(kinds - 1, 4)}
    fitted = [window for kind in range(5) for window in windows(kind, 3)]
    held_out = [window for kind in (5, 6) for window in windows(kind, 2)]
    text = SplitText(fitted + held_out, ["fitted"] * 15 + ["5", "5", "6", "6"], [False] * 15 + [True] * 4)
    options = CalibrationOptions(kind="lowbit", bits=2, max_loss=limit)
    found = calibrate(model, executor, text, options)
    assert list(found.about["kinds"]) == ["5", "6"] and found.about["outcome"]["perplexity_rise"] <= limit
    meter = LossMeter(executor, unseen)
    promised = meter.costs(found)["unseen"].kl
    alone = meter.costs(calibrate(model, executor, windows(0, 19), options))["unseen"].kl
    assert promised <= 2 * limit and promised < 0.7 * alone, (promised, alone)


@pytest.mark.parametrize("thresholds", ["error", "recall", "uniform"])
def test_the_density_budget_is_met(model: ModelFile, executor: ReferenceExecutor, thresholds: str) -> None:
    options = CalibrationOptions(rank=32, thresholds=thresholds, density=0.4)  # type: ignore[arg-type]
    for row in calibrate(model, executor, WINDOWS, options).about["table"]:
        assert row["predicted_density"] == pytest.approx(0.4, abs=0.05)


@pytest.mark.parametrize(
    "name", ["prosparse", "bamboo", "llama_relu2", "llama_relu_biases", "opt", "falcon_7b_relu", "bitnet"]
)
def test_every_relu_family_can_be_calibrated(name: str, tmp_path: Path) -> None:
    with write_model(tmp_path / "model.svdp", zoo()[name]) as model_file:
        executor = executor_of(model_file)
        options = CalibrationOptions(kind="svd+lowbit", rank=16, bits=2, max_error=0.005)
        found = calibrate(model_file, executor, WINDOWS, options)
        for row in found.about["table"]:
            assert row["auroc"] > 0.9 and row["relative_error"] < 0.02 and row["predicted_density"] < 0.95


def test_automatic_choice_reads_no_more_than_any_fixed_one(model: ModelFile, executor: ReferenceExecutor) -> None:
    def traffic(options: CalibrationOptions) -> float:
        rows = calibrate(model, executor, WINDOWS, options).about["table"]
        third = rows[0]["dense_bytes"] / 3
        return sum(r["bytes"] + third * (r["predicted_density"] + 2 * r["computed_density"]) for r in rows)

    chosen = traffic(CalibrationOptions(kind="auto", max_error=1e-4))
    for kind, rank, bits in (("svd", 64, None), ("lowbit", None, 1), ("lowbit", None, 2)):
        assert chosen <= 1.05 * traffic(CalibrationOptions(kind=kind, rank=rank, bits=bits, max_error=1e-4))


def test_a_large_model_is_calibrated_from_its_sampled_rows(
    model: ModelFile, executor: ReferenceExecutor, predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration_size, "LARGE", 64)
    size = calibration_size.calibration_size(model.config)
    assert (size.kind, size.moments, size.rank) == ("svd", False, 64)
    found = calibrate(model, executor, WINDOWS, CalibrationOptions(rank=32, max_error=0.01))
    for row, other in zip(found.about["table"], predictor.about["table"], strict=True):
        assert row["auroc"] == pytest.approx(other["auroc"], abs=0.02)
        assert row["predicted_density"] == pytest.approx(other["predicted_density"], abs=0.05)
    chosen = calibrate(model, executor, WINDOWS, CalibrationOptions(max_error=0.01))
    assert [layer.rank for layer in chosen.layers] == [64, 64]


def test_what_cannot_be_calibrated_is_refused(model: ModelFile, executor: ReferenceExecutor, tmp_path: Path) -> None:
    for options, what in (
        ({"max_loss": 0.1, "density": 0.5}, "one budget"),
        ({"density": 1.5}, "share between 0 and 1"),
        ({"thresholds": "magic"}, "unknown thresholds"),
        ({"factor_format": "f32"}, "q8 or q4"),
    ):
        with pytest.raises(ConversionError, match=what):
            CalibrationOptions(**options)  # type: ignore[arg-type]
    with pytest.raises(ConversionError, match=r"rank of svd must lie in 1\.\.90, found 91"):
        calibrate(model, executor, WINDOWS, CalibrationOptions(rank=91))
    with pytest.raises(ConversionError, match="at least 256"):
        calibrate(model, executor, [w[:20] for w in WINDOWS])
    with (
        write_model(tmp_path / "silu.svdp", zoo()["llama"]) as dense,
        pytest.raises(ConversionError, match="silu has no zeros"),
    ):
        calibrate(dense, executor, WINDOWS)


def test_a_predictor_file_round_trips(model: ModelFile, predictor: Predictor, tmp_path: Path) -> None:
    path = tmp_path / "predictor.safetensors"
    write_predictor(path, predictor)
    found = read_predictor(path, model)
    x = np.random.default_rng(0).standard_normal((3, 90)).astype(np.float32)
    for one, other in zip(found.layers, predictor.layers, strict=True):
        np.testing.assert_array_equal(scores(one, x), scores(other, x))
    assert {k: v for k, v in found.about.items() if k != "layers"} == predictor.about


def test_a_model_file_takes_a_predictor_and_another_one(model: ModelFile, predictor: Predictor, tmp_path: Path) -> None:
    path = tmp_path / "both.svdp"
    write_model_with_predictor(path, model, predictor)
    with read_model_file(path) as both:
        assert model_fingerprint(both) == model_fingerprint(model)
        np.testing.assert_array_equal(both.arrays["predictor.1.unit"], predictor.layers[1].unit)
        for name, array in model.arrays.items():
            np.testing.assert_array_equal(both.arrays[name], array)
        write_model_with_predictor(path, both, predictor)  # onto itself
    with read_model_file(path) as again:
        assert again.config == model.config and "predictor" in again.metadata
    assert [p.name for p in tmp_path.iterdir()] == ["both.svdp"]


def test_a_predictor_of_another_model_is_refused(model: ModelFile, predictor: Predictor, tmp_path: Path) -> None:
    path = tmp_path / "predictor.safetensors"
    write_predictor(path, predictor)
    with write_model(tmp_path / "other.svdp", model.config, seed=1) as other:
        with pytest.raises(ModelFileError, match="made for another model"):
            read_predictor(path, other)
        with pytest.raises(ModelFileError, match="made for another model"):
            write_model_with_predictor(tmp_path / "new.svdp", other, predictor)
        with pytest.raises(ModelFileError, match="made for another model"):
            check_fingerprint(predictor, other, path)
    assert not (tmp_path / "new.svdp").exists()
    with pytest.raises(ModelFileError, match="not a predictor file"):
        read_predictor(model.path, model)


def test_damaged_predictor_files_are_refused(model: ModelFile, predictor: Predictor, tmp_path: Path) -> None:
    path = tmp_path / "predictor.safetensors"
    first = predictor.layers[0]
    damaged = calibration.replace(first, threshold=first.threshold * np.nan)
    broken = Predictor((damaged, *predictor.layers[1:]), predictor.about)
    write_predictor(path, broken)
    with pytest.raises(ModelFileError, match=r"predictor\.0\.threshold holds NaN"):
        read_predictor(path, model)
    write_predictor(path, predictor)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelFileError, match="truncated"):
        read_predictor(path, model)
    with TensorWriter(path, {}, {"format": "svdp-predictor", "format_version": "3"}):
        pass
    with pytest.raises(ModelFileError, match="format version '3'"):
        read_predictor(path, model)
    with TensorWriter(path, {}, {"format": "svdp-predictor", "format_version": "1", "predictor": "{"}):
        pass
    with pytest.raises(ModelFileError):
        read_predictor(path, model)


def test_an_interrupted_write_leaves_no_file(
    model: ModelFile, predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = TensorWriter.write, []

    def interrupt(self: TensorWriter, *arguments: object) -> None:
        calls.append(arguments)
        if len(calls) % 5 == 0:
            raise KeyboardInterrupt
        write(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(TensorWriter, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_predictor(tmp_path / "predictor.safetensors", predictor)
    with pytest.raises(KeyboardInterrupt):
        write_model_with_predictor(tmp_path / "model.svdp", model, predictor)
    assert not list(tmp_path.iterdir())
