"""PowerInfer's trained predictors: the same neurons as PowerInfer chooses, files, thresholds, and what is refused."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_zoo import random_tokens, zoo
from test_calibration import WINDOWS, executor_of, write_model

from svdengine.converters.calibration import CalibrationOptions, calibrate
from svdengine.converters.ffn_layer import read_ffn_layer
from svdengine.converters.powerinfer import MAGIC, THRESHOLD_FIELD, Network, build_network, open_powerinfer
from svdengine.errors import ConversionError
from svdengine.files.model_file import ModelFile, read_model_file
from svdengine.files.predictor_file import read_predictor, write_model_with_predictor, write_predictor
from svdengine.kernels.base_executor import ExecutorSetup
from svdengine.kernels.cpu.executor import CpuExecutor
from svdengine.kernels.predictor import Predictor, scores
from svdengine.kernels.reference import ReferenceExecutor, rms_norm

CONFIG = zoo()["llama_relu_tied"]
D, F, H = CONFIG.hidden_size, CONFIG.ffn_size, 110  # wider than the input


def tensors(seed: int = 0, rank: int = H, layers: int = CONFIG.layer_count) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = {1: (rank, D), 2: (F, rank)}
    return {
        f"blk.{layer}.fc{matrix}.weight": random.standard_normal(shape, np.float32) * np.float32(shape[1] ** -0.5)
        for layer in range(layers)
        for matrix, shape in shapes.items()
    }


def write_file(path: Path, arrays: dict[str, Any], threshold: Any = 0.0) -> Path:
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    if isinstance(threshold, str):
        writer.add_string(THRESHOLD_FIELD, threshold)
    elif threshold is not None:
        writer.add_float32(THRESHOLD_FIELD, threshold)
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelFile]:
    with write_model(tmp_path_factory.mktemp("model") / "model.svdp", CONFIG) as model_file:
        yield model_file


@pytest.fixture(scope="module")
def executor(model: ModelFile) -> ReferenceExecutor:
    return executor_of(model)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("threshold", [0.0, None])
def test_the_neurons_are_those_that_powerinfer_computes(
    model: ModelFile, tmp_path: Path, dtype: type, threshold: float | None
) -> None:
    arrays = {name: array.astype(dtype) for name, array in tensors().items()}
    path = write_file(tmp_path / "p.gguf", arrays, threshold)
    path.write_bytes(MAGIC + path.read_bytes()[4:])  # as PowerInfer's converter leaves it
    file = open_powerinfer(path, model, trained_thresholds=True)
    stream = np.random.default_rng(1).standard_normal((50, D), np.float32) * 30  # before the norm
    for layer in range(CONFIG.layer_count):
        fc1, fc2 = (arrays[f"blk.{layer}.fc{i}.weight"].astype(np.float32) for i in (1, 2))
        theirs = np.maximum(stream @ fc1.T, 0) @ fc2.T
        x = rms_norm(stream, model.arrays["ffn_norm.weight"][layer], CONFIG.norm_eps)
        network = file.read_layer(layer)
        exact = network.scores(x)
        assert ((exact > 0) != (theirs >= 0)).mean() < 1e-3
        ours = scores(build_network(network, x, "q8", "p"), x)
        assert ((ours > 0) != (theirs >= 0)).mean() < 0.02
        assert np.corrcoef(ours.ravel(), exact.ravel())[0, 1] > 0.999


def test_a_token_whose_hidden_values_are_all_zero_computes_every_neuron() -> None:
    network = Network(-np.ones((4, D), np.float32), np.ones((F, 4), np.float32))
    x = np.stack([np.ones(D), -np.ones(D), np.linspace(-1, 2, D)]).astype(np.float32)
    predictor = build_network(network, x, "q8", "p")
    assert (scores(predictor, x) > 0).all()
    assert np.isfinite(predictor.unit).all() and (predictor.unit > 0).all()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_file(tmp_path_factory.mktemp("source") / "p.gguf", tensors())


def test_trained_thresholds_are_left_as_they_are(
    model: ModelFile, executor: ReferenceExecutor, source: Path, tmp_path: Path
) -> None:
    options = CalibrationOptions(kind="powerinfer", source=source, thresholds="trained")
    found = calibrate(model, executor, WINDOWS, options)
    assert found.about["kind"] == "powerinfer" and found.about["thresholds"] == "trained"
    assert found.about["budget"] == {} == found.about["outcome"]
    for layer, row in zip(found.layers, found.about["table"], strict=True):
        assert layer.relu and layer.rank == H == row["rank"] and 0 < -layer.threshold.max() < 1e-30
        assert 0.3 < row["auroc"] < 0.7  # these know nothing
    x = np.random.default_rng(0).standard_normal((3, D)).astype(np.float32)
    write_predictor(tmp_path / "p.safetensors", found)
    write_model_with_predictor(tmp_path / "m.svdp", model, found)
    with read_model_file(tmp_path / "m.svdp") as both:
        from svdengine.files.predictor_file import find_predictor

        for again in (read_predictor(tmp_path / "p.safetensors", model), find_predictor(both)):
            assert again is not None
            for one, other in zip(again.layers, found.layers, strict=True):
                assert one.relu
                np.testing.assert_array_equal(scores(one, x), scores(other, x))


@pytest.mark.parametrize("thresholds", ["error", "recall", "uniform"])
def test_our_thresholds_meet_a_budget(
    model: ModelFile, executor: ReferenceExecutor, tmp_path: Path, thresholds: str
) -> None:
    path = write_file(tmp_path / "p.gguf", informed(model), 0.5)  # its threshold is of no account here
    options = CalibrationOptions(kind="powerinfer", source=path, thresholds=thresholds, density=0.4)  # type: ignore[arg-type]
    for row in calibrate(model, executor, WINDOWS, options).about["table"]:
        assert row["predicted_density"] == pytest.approx(0.4, abs=0.05)
        assert row["auroc"] > 0.95 and row["recall"] > 0.6


def informed(model: ModelFile) -> dict[str, np.ndarray]:
    """Networks whose scores are a fiftieth of the gates at rank 70: v = relu(v) - relu(-v)."""
    arrays = {}
    for layer in range(CONFIG.layer_count):
        gate = read_ffn_layer(model, layer).gate * model.arrays["ffn_norm.weight"][layer]
        u, s, vt = np.linalg.svd(gate, full_matrices=False)
        half = (s[:70, None] * vt[:70]).astype(np.float32)
        arrays[f"blk.{layer}.fc1.weight"] = np.concatenate([half, -half])
        arrays[f"blk.{layer}.fc2.weight"] = np.concatenate([u[:, :70], -u[:, :70]], 1).astype(np.float32) / 50
    return arrays


def test_the_cpu_executor_lists_the_same_neurons(model: ModelFile, executor: ReferenceExecutor, tmp_path: Path) -> None:
    path = write_file(tmp_path / "p.gguf", informed(model))
    options = CalibrationOptions(kind="powerinfer", source=path, max_error=0.01)
    predictor = calibrate(model, executor, WINDOWS, options)
    setup = ExecutorSetup(model.config, model.arrays, model.formats, block_count=8, kv_dtype="f32")
    cpu = CpuExecutor(setup, threads=2)
    reference = executor_of(model)
    try:
        logits = []
        for one in (cpu, reference):
            one.predictor, one.ffn = predictor, "sparse"
            logits.append(one.forward(batch_of(random_tokens(CONFIG, 40))).copy())
        counts = [one.neuron_counts() for one in (cpu, reference)]
        assert abs(counts[0].predicted - counts[1].predicted) < 0.01 * counts[1].total
        assert 0.1 < counts[1].predicted / counts[1].total < 0.9
        assert np.abs(logits[0] - logits[1]).max() < 0.1 * logits[1].std()
        everything = tuple(replace(layer, threshold=np.full(F, -1e9, np.float32)) for layer in predictor.layers)
        cpu.predictor = Predictor(everything, {})
        dense = cpu.forward(batch_of([7])).copy()
        cpu.ffn = "dense"
        np.testing.assert_array_equal(cpu.forward(batch_of([7])), dense)
    finally:
        cpu.close()


def batch_of(tokens: list[int]) -> Any:
    from model_zoo import block_table, make_batch

    return make_batch([(tokens, 0)], [block_table(len(tokens))])


def without(name: str) -> dict[str, np.ndarray]:
    return {key: array for key, array in tensors().items() if key != name}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"token_embd.weight": np.zeros((3, D), np.float32)}, "holds no trained predictors"),
        (tensors(layers=1), "has predictors for 1 layers up to number 0, the model has 2 layers"),
        (tensors(layers=3), "has predictors for 3 layers up to number 2, the model has 2 layers"),
        (without("blk.1.fc2.weight"), "'blk.1.fc2.weight' is missing"),
        ({**tensors(), "blk.0.fc1.bias": np.zeros(H, np.float32)}, "have no biases"),
        ({**tensors(), "blk.0.fc1.weight": np.zeros((H, D + 1), np.float32)}, r"expected at most 150 rows of 90"),
        ({**tensors(), "blk.1.fc2.weight": np.zeros((F, H - 1), np.float32)}, r"expected \(150, 110\)"),
        (tensors(rank=F + 1), "expected at most 150 rows of 90"),
        ({**tensors(), "blk.1.fc1.weight": np.full((H, D), np.nan, np.float32)}, "'blk.1.fc1.weight' holds NaN"),
        ({**tensors(), "blk.1.fc2.weight": np.full((F, H), 1e38, np.float32)}, "layer 1: a weight is too large"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    model: ModelFile, executor: ReferenceExecutor, tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    path = write_file(tmp_path / "p.gguf", arrays)
    options = CalibrationOptions(kind="powerinfer", source=path, max_error=0.01)
    with pytest.raises(ConversionError, match=message) as caught:
        calibrate(model, executor, WINDOWS, options)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("threshold", "message"), [(0.5, "is 0.5; only 0"), (np.nan, "must be a number"), ("0", "must be a number")]
)
def test_thresholds_that_depend_on_the_token_are_refused(
    model: ModelFile, tmp_path: Path, threshold: Any, message: str
) -> None:
    path = write_file(tmp_path / "p.gguf", tensors(), threshold)
    with pytest.raises(ConversionError, match=message):
        open_powerinfer(path, model, trained_thresholds=True)


def test_channels_that_the_norm_removes_may_not_be_read(model: ModelFile, source: Path) -> None:
    file = open_powerinfer(source, model)
    weights = file.norm_weights.copy()
    weights[1, 4] = 0
    with pytest.raises(ConversionError, match="layer 1 reads channel 4, which the model's norm multiplies by 0"):
        replace(file, norm_weights=weights).read_layer(1)


@pytest.mark.parametrize("name", ["opt", "falcon_7b_relu"])
def test_models_with_another_norm_are_refused(source: Path, tmp_path: Path, name: str) -> None:
    with (
        write_model(tmp_path / "model.svdp", zoo()[name]) as other,
        pytest.raises(ConversionError, match="norm cannot be undone"),
    ):
        open_powerinfer(source, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "powerinfer"}, "is read from a GGUF file"),
        ({"kind": "svd", "source": Path("p.gguf")}, "is read from a GGUF file"),
        ({"kind": "powerinfer", "source": Path("p.gguf"), "rank": 8}, "leave --rank out"),
        ({"kind": "powerinfer", "source": Path("p.gguf"), "thresholds": "trained", "density": 0.2}, "meet no budget"),
        ({"kind": "svd", "thresholds": "trained"}, "trained thresholds are those of a powerinfer predictor"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        CalibrationOptions(**options)
