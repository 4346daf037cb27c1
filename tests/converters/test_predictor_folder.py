"""Predictors in folders of model_N.pt: the paper's and PowerInfer's are read as they compute, and ours written so."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from model_zoo import zoo
from test_calibration import WINDOWS, executor_of, write_model
from test_powerinfer import informed

from svdengine.cli import main
from svdengine.converters.calibration import CalibrationOptions, calibrate
from svdengine.converters.ffn_layer import read_ffn_layer
from svdengine.converters.powerinfer import Network, build_network
from svdengine.converters.predictor_folder import DIRECTIONS, export_predictor, open_predictor_folder
from svdengine.converters.torch_file import read_torch_file
from svdengine.converters.torch_writer import write_torch_file
from svdengine.errors import ConversionError
from svdengine.files.model_file import ModelFile
from svdengine.files.predictor_file import model_fingerprint, write_predictor
from svdengine.kernels.predictor import LayerPredictor, Predictor, scores
from svdengine.kernels.reference import ReferenceExecutor, rms_norm

torch = pytest.importorskip("torch")

CONFIG = zoo()["llama_relu_tied"]
D, F, H = CONFIG.hidden_size, CONFIG.ffn_size, 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelFile]:
    with write_model(tmp_path_factory.mktemp("model") / "model.svdp", CONFIG) as model_file:
        yield model_file


@pytest.fixture(scope="module")
def executor(model: ModelFile) -> ReferenceExecutor:
    return executor_of(model)


def of_paper(rank: int = H, dtype: Any = torch.float16) -> list[dict[str, Any]]:
    """What the paper's code saves: the state of two linear layers, the second with a bias."""
    torch.manual_seed(0)
    layers = []
    for _ in range(CONFIG.layer_count):
        first, second = torch.nn.Linear(D, rank, bias=False), torch.nn.Linear(rank, F, bias=True)
        module = torch.nn.ModuleDict({"fc1": first, "fc2": second}).to(dtype)
        layers.append(module.state_dict())
    return layers


def write_folder(path: Path, layers: list[dict[str, Any]]) -> Path:
    path.mkdir()
    for index, layer in enumerate(layers):
        torch.save(layer, path / f"model_{index}.pt")
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_papers_predictors_choose_the_same_neurons(model: ModelFile, tmp_path: Path, dtype: Any) -> None:
    layers = of_paper(dtype=dtype)
    folder = open_predictor_folder(write_folder(tmp_path / "p", layers), model, trained_thresholds=True)
    x = np.random.default_rng(0).standard_normal((60, D), np.float32)
    for index, layer in enumerate(layers):
        first, second, bias = (layer[name].float().numpy() for name in ("fc1.weight", "fc2.weight", "fc2.bias"))
        theirs = x @ first.T @ second.T + bias
        (network,) = folder.readings(index)
        np.testing.assert_allclose(network.scores(x), theirs, atol=1e-5)
        ours = build_network(network, x, "q8", "p")
        assert not ours.relu and ours.rank == H
        assert ((scores(ours, x) > 0) != (theirs > 0)).mean() < 0.02


def test_their_biases_are_thresholds_that_are_kept(
    model: ModelFile, executor: ReferenceExecutor, tmp_path: Path
) -> None:
    layers = of_paper()
    options = CalibrationOptions(kind="powerinfer", source=write_folder(tmp_path / "p", layers), thresholds="trained")
    found = calibrate(model, executor, WINDOWS, options)
    for layer, given in zip(found.layers, layers, strict=True):
        np.testing.assert_array_equal(layer.threshold, -given["fc2.bias"].float().numpy())


def test_our_thresholds_meet_a_budget(model: ModelFile, executor: ReferenceExecutor, tmp_path: Path) -> None:
    layers = of_paper(rank=D)
    for index, layer in enumerate(layers):
        layer["fc1.weight"] = torch.eye(D).half()
        layer["fc2.weight"] = torch.from_numpy(np.array(read_ffn_layer(model, index).gate)).half()
    options = CalibrationOptions(kind="powerinfer", source=write_folder(tmp_path / "p", layers), density=0.4)
    for row in calibrate(model, executor, WINDOWS, options).about["table"]:
        assert row["predicted_density"] == pytest.approx(0.4, abs=0.05)
        assert row["auroc"] > 0.95


def of_powerinfer(model: ModelFile, stream: bool) -> list[dict[str, Any]]:
    """Networks with ReLU that know the gates, of the stream before the norm or of what leaves it."""
    arrays = informed(model)
    layers = []
    for index in range(CONFIG.layer_count):
        first, second = (arrays[f"blk.{index}.fc{matrix}.weight"] for matrix in (1, 2))
        if not stream:
            first = first / model.arrays["ffn_norm.weight"][index]
        layers.append({"fc1.weight": torch.from_numpy(first), "fc2.weight": torch.from_numpy(second)})
    return layers


@pytest.mark.parametrize("stream", [True, False])
def test_what_powerinfers_read_is_measured(
    model: ModelFile, executor: ReferenceExecutor, tmp_path: Path, stream: bool
) -> None:
    """PowerInfer gives them the stream before the norm; the paper's code gives such files what leaves it."""
    path = write_folder(tmp_path / "p", of_powerinfer(model, stream))
    options = CalibrationOptions(kind="powerinfer", source=path, thresholds="trained")
    found = calibrate(model, executor, WINDOWS, options)
    reading = 0 if stream else 1
    x = np.random.default_rng(0).standard_normal((50, D), np.float32)
    for index, layer in enumerate(found.layers):
        assert layer.relu and found.about["table"][index]["auroc"] > 0.95
        right = open_predictor_folder(path, model).readings(index)[reading].scores(x)
        assert np.corrcoef(scores(layer, x).ravel(), right.ravel())[0, 1] > 0.999


def changed(**tensors: Any) -> dict[str, Any]:
    layer = of_paper()[0]
    for name, tensor in tensors.items():
        key = name.replace("_", ".")
        if tensor is None:
            del layer[key]
        else:
            layer[key] = tensor
    return layer


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (changed(fc1_weight=None), r"model_1\.pt: lacks 'fc1\.weight'"),
        (changed(fc1_bias=torch.zeros(H)), r"model_1\.pt: found 'fc1\.bias'"),
        (changed(fc1_weight=torch.zeros(H, D + 1)), "has shape .*: made for another model"),
        (changed(fc1_weight=torch.zeros(D + 1, D)), "expected at most 90 rows of 90"),
        (changed(fc2_weight=torch.zeros(F, H + 1)), r"fc2\.weight has shape .* expected \(150, 20\)"),
        (changed(fc2_bias=torch.zeros(F + 1)), r"fc2\.bias has shape .* expected \(150,\)"),
        (changed(fc2_bias=torch.zeros(F, dtype=torch.int64)), r"fc2\.bias is I64"),
        (changed(fc2_weight=torch.full((F, H), float("nan"))), "holds NaN"),
        ({"fc1.weight": 3}, "expected nothing but tensors"),
    ],
    ids=range(9),
)
def test_folders_that_do_not_fit_are_refused(
    model: ModelFile, executor: ReferenceExecutor, tmp_path: Path, layer: dict[str, Any], message: str
) -> None:
    path = write_folder(tmp_path / "p", [of_paper()[0], layer])
    options = CalibrationOptions(kind="powerinfer", source=path, thresholds="trained")
    with pytest.raises(ConversionError, match=message) as caught:
        calibrate(model, executor, WINDOWS, options)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_folders_with_other_layers_are_refused(model: ModelFile, tmp_path: Path) -> None:
    layers = of_paper()
    for count, message in ((0, "holds no predictors"), (1, r"model_1\.pt: missing"), (3, "has 2 layers")):
        path = write_folder(tmp_path / str(count), [*layers, layers[0]][:count])
        with pytest.raises(ConversionError, match=message):
            open_predictor_folder(path, model)


def test_a_file_in_place_of_the_folder(model: ModelFile, executor: ReferenceExecutor, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "p", of_paper()) / "model_0.pt"
    with pytest.raises(ConversionError, match="give the folder that holds them all"):
        calibrate(model, executor, WINDOWS, CalibrationOptions(kind="powerinfer", source=source))


def test_a_threshold_beside_powerinfers(model: ModelFile, tmp_path: Path) -> None:
    path = write_folder(tmp_path / "p", of_powerinfer(model, True))
    (path / "config.json").write_text('{"sparse_threshold": 0.5}')
    open_predictor_folder(path, model)
    with pytest.raises(ConversionError, match=r"sparse_threshold is '0\.5'; only 0"):
        open_predictor_folder(path, model, trained_thresholds=True)


@pytest.mark.parametrize("name", ["opt", "falcon_7b_relu"])
def test_models_with_another_norm(tmp_path: Path, name: str) -> None:
    """The paper's read what leaves the norm, of whatever kind that is; of PowerInfer's the norm cannot be undone."""
    config = zoo()[name]
    sizes = torch.zeros(8, config.hidden_size), torch.zeros(config.ffn_size, 8)
    layer = {"fc1.weight": sizes[0], "fc2.weight": sizes[1]}
    biased = {**layer, "fc2.bias": torch.zeros(config.ffn_size)}
    with write_model(tmp_path / "model.svdp", config) as other:
        open_predictor_folder(write_folder(tmp_path / "a", [biased] * config.layer_count), other)
        path = write_folder(tmp_path / "b", [layer] * config.layer_count)
        with pytest.raises(ConversionError, match="norm cannot be undone"):
            open_predictor_folder(path, other)


@pytest.mark.parametrize("protocol", [True, False])
def test_torch_reads_what_is_written(tmp_path: Path, protocol: bool) -> None:
    random = np.random.default_rng(0)
    arrays = {
        "fc1.weight": random.standard_normal((3, 70_000)).astype(np.float16),
        "empty": np.zeros((0, 4), np.float32),
        "one": np.array(2.5, np.float32),
        "transposed": random.standard_normal((4, 5)).astype(np.float32).T,
        "name \u00e9": np.ones(1, np.float16),
    }
    for path in (tmp_path / "a.pt", tmp_path / "b.pt"):
        write_torch_file(path, arrays)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt", "b.pt"]
    found = torch.load(tmp_path / "a.pt", weights_only=protocol)
    assert list(found) == list(arrays) == list(read_torch_file(tmp_path / "a.pt"))
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name].numpy(), array)
        assert found[name].is_contiguous()
    with pytest.raises(ConversionError, match="No such file"):
        write_torch_file(tmp_path / "none" / "a.pt", arrays)


def random_predictor(model: ModelFile, relu: bool = False, bias: bool = True, bits: int = 0) -> Predictor:
    random = np.random.default_rng(1)
    x = random.standard_normal((400, D), np.float32)
    layers = []
    for _ in range(CONFIG.layer_count):
        first, second = random.standard_normal((H, D), np.float32), random.standard_normal((F, H), np.float32) * 30
        spread = (x @ first.T @ second.T).std(0)
        biases = (random.standard_normal(F, np.float32) * spread * 0.7).astype(np.float32) if bias else None
        layers.append(replace(build_network(Network(first, second, biases, relu), x, "q8", "p"), residual_bits=bits))
    return Predictor(tuple(layers), {"kind": "svd", "fingerprint": model_fingerprint(model)})


def choice(layer: LayerPredictor, x: np.ndarray) -> np.ndarray:
    return scores(layer, x) > 0


def test_export_for_the_papers_code(model: ModelFile, tmp_path: Path) -> None:
    predictor = random_predictor(model)
    export_predictor(tmp_path / "p", model, predictor, "paper")
    x = np.random.default_rng(2).standard_normal((300, D), np.float32)
    for index, layer in enumerate(predictor.layers):
        state = torch.load(tmp_path / "p" / f"model_{index}.pt", weights_only=True)
        module = torch.nn.ModuleDict({"fc1": torch.nn.Linear(D, H, bias=False), "fc2": torch.nn.Linear(H, F)}).half()
        module.load_state_dict(state)  # strictly: nothing more, nothing less
        with torch.no_grad():
            theirs = module["fc2"](module["fc1"](torch.from_numpy(x).half())).float().numpy()
        assert ((theirs > 0) == choice(layer, x)).mean() > 0.995
    again = open_predictor_folder(tmp_path / "p", model)
    for index, layer in enumerate(predictor.layers):
        back = build_network(again.readings(index)[0], x, "q8", "p")
        assert (choice(back, x) == choice(layer, x)).mean() > 0.99


def stream_of(model: ModelFile, layer: int, count: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """The residual stream of tokens, of any size, with a few channels that are much larger; and what the norm makes."""
    random = np.random.default_rng(3)
    stream = random.standard_normal((count, D), np.float32) * np.exp(random.standard_normal((count, 1)) * 2)
    stream[:, 5] *= 12
    stream = stream.astype(np.float32)
    return stream, rms_norm(stream, model.arrays["ffn_norm.weight"][layer], CONFIG.norm_eps)


def powerinfer_scores(path: Path, stream: np.ndarray) -> np.ndarray:
    """As PowerInfer computes them; its converter takes these two tensors and no others."""
    state = torch.load(path, weights_only=True)
    assert list(state) == ["fc1.weight", "fc2.weight"]
    first, second = (state[name].float().numpy() for name in state)
    return np.maximum(stream @ first.T, 0) @ second.T


def test_trained_networks_come_back_as_they_were(model: ModelFile, executor: ReferenceExecutor, tmp_path: Path) -> None:
    layers = of_powerinfer(model, True)
    path = write_folder(tmp_path / "p", layers)
    options = CalibrationOptions(kind="powerinfer", source=path, thresholds="trained")
    export_predictor(tmp_path / "q", model, calibrate(model, executor, WINDOWS, options), "powerinfer")
    for index, layer in enumerate(layers):
        stream, _ = stream_of(model, index)
        before = np.maximum(stream @ layer["fc1.weight"].numpy().T, 0) @ layer["fc2.weight"].numpy().T
        after = powerinfer_scores(tmp_path / "q" / f"model_{index}.pt", stream)
        assert ((before >= 0) == (after >= 0)).mean() > 0.99


@pytest.mark.parametrize(("relu", "width"), [(False, 2 * H + 2 * DIRECTIONS), (True, H + 2 * DIRECTIONS)])
def test_export_for_powerinfer(model: ModelFile, tmp_path: Path, relu: bool, width: int) -> None:
    """Thresholds become multiples of an estimate of the stream's size, which moves few neurons."""
    predictor = random_predictor(model, relu)
    export_predictor(tmp_path / "p", model, predictor, "powerinfer")
    for index, layer in enumerate(predictor.layers):
        stream, x = stream_of(model, index)
        found = powerinfer_scores(tmp_path / "p" / f"model_{index}.pt", stream)
        assert read_torch_file(tmp_path / "p" / f"model_{index}.pt")["fc1.weight"].shape == (width, D)
        agree = ((found >= 0) == choice(layer, x)).mean()
        without = ((scores(replace(layer, threshold=np.zeros(F, np.float32)), x) > 0) == choice(layer, x)).mean()
        assert agree > 0.95 > 0.9 > without


def test_what_cannot_be_exported(model: ModelFile, tmp_path: Path) -> None:
    for predictor, layout, message in (
        (random_predictor(model, bits=2), "paper", "has a low-bit part.*--predictor svd"),
        (random_predictor(model, relu=True), "paper", "has a ReLU.*--layout powerinfer"),
    ):
        with pytest.raises(ConversionError, match=message):
            export_predictor(tmp_path / "p", model, predictor, layout)  # type: ignore[arg-type]
    assert not (tmp_path / "p").exists()
    export_predictor(tmp_path / "p", model, random_predictor(model), "paper")
    with pytest.raises(ConversionError, match="holds predictors already"):
        export_predictor(tmp_path / "p", model, random_predictor(model), "paper")
    with write_model(tmp_path / "opt.svdp", zoo()["opt"]) as other:
        layer = build_network(Network(np.ones((4, other.config.hidden_size), np.float32),
                                      np.ones((other.config.ffn_size, 4), np.float32), None, False),
                              np.ones((3, other.config.hidden_size), np.float32), "q8", "p")  # fmt: skip
        one = Predictor((layer,) * other.config.layer_count, {})
        export_predictor(tmp_path / "q", other, one, "paper")
        with pytest.raises(ConversionError, match="norm cannot be undone"):
            export_predictor(tmp_path / "r", other, one, "powerinfer")


def test_numbers_beyond_float16_are_made_smaller(model: ModelFile, tmp_path: Path) -> None:
    layers = []
    for layer in random_predictor(model).layers:
        threshold = layer.threshold.copy()
        threshold[:3] = 1e9 * layer.unit[:3]  # never computed
        layers.append(replace(layer, threshold=threshold, b={**layer.b, ".scale": layer.b[".scale"] * np.float16(9)}))
    predictor = Predictor(tuple(layers), {})
    export_predictor(tmp_path / "p", model, predictor, "paper")
    x = np.random.default_rng(2).standard_normal((300, D), np.float32)
    folder = open_predictor_folder(tmp_path / "p", model)
    for index, layer in enumerate(layers):
        assert (folder.readings(index)[0].scores(x)[:, 3:] > 0).mean() == pytest.approx(
            choice(layer, x)[:, 3:].mean(), abs=0.01
        )
        assert not (folder.readings(index)[0].scores(x)[:, :3] > 0).any()


def test_the_commands(model: ModelFile, tmp_path: Path) -> None:
    write_predictor(tmp_path / "p.safetensors", random_predictor(model))
    run = CliRunner()
    arguments = ["export", str(model.path), "-o", str(tmp_path / "p"), "--predictor", str(tmp_path / "p.safetensors")]
    done = run.invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == ["model_0.pt", "model_1.pt"]
    again = run.invoke(main, arguments)
    assert again.exit_code == 1 and "holds predictors already" in again.output
    bare = run.invoke(main, ["export", str(model.path), "-o", str(tmp_path / "q")])
    assert bare.exit_code == 1 and "has no predictor" in bare.output
