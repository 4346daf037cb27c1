"""Models of random weights: both files load, run, and hold the same weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from model_zoo import make_batch, random_tokens
from numpy.typing import NDArray

from svdengine.converters import convert
from svdengine.files.model_file import read_model_file
from svdengine.kernels.base_executor import ExecutorSetup
from svdengine.kernels.cpu.executor import CpuExecutor
from svdengine.kernels.reference import float32_weights
from svdengine.models import ModelConfig, tensor_specs
from svdengine.tools import random_model
from svdengine.tools.random_gguf import write_gguf
from svdengine.tools.random_model import SHAPES, RandomWeights, shape_config, write_svdp

TINY = replace(
    SHAPES["llama2-7b"],
    vocab_size=320,
    hidden_size=128,
    layer_count=2,
    head_count=4,
    kv_head_count=2,
    head_dim=32,
    ffn_size=192,
    max_position=256,
)
_EXPERTS = {
    "vocab_size": 320, "hidden_size": 128, "layer_count": 5, "head_count": 4, "kv_head_count": 2, "head_dim": 32,
    "ffn_size": 64, "max_position": 256, "expert_count": 6, "active_experts": 2,
}  # fmt: skip
GGUF_CONFIGS = {
    "llama": TINY,
    "mixtral": replace(SHAPES["mixtral-8x7b"], **_EXPERTS),
    "smallthinker": replace(SHAPES["smallthinker-4b"], **_EXPERTS),
    "smallthinker-windows": replace(
        SHAPES["smallthinker-21b"], sliding_window_layers=(1, 2, 3), unrotated_layers=(0, 4), **_EXPERTS
    ),
}


def run(path: Path, tokens: list[int]) -> NDArray[np.float32]:
    with read_model_file(path) as file:
        executor = CpuExecutor(ExecutorSetup(file.config, file.arrays, file.formats, block_count=4), threads=1)
        try:
            return executor.forward(make_batch([(tokens, 0)], [[0, 1]])).copy()
        finally:
            executor.close()


@pytest.mark.parametrize("dtype", ["q8", "q4"])
@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_the_model_file_runs_and_its_activations_stay_near_one(tmp_path: Path, activation: str, dtype: str) -> None:
    config = replace(TINY, activation=activation)
    write_svdp(tmp_path / "m.svdp", config, dtype)
    logits = run(tmp_path / "m.svdp", random_tokens(config, 20))
    assert logits.shape == (20, config.vocab_size)
    assert 0.5 < logits.std() < 2


def test_weights_are_the_same_every_time_and_differ_between_tensors_layers_and_seeds() -> None:
    weights = RandomWeights(TINY)
    gate = weights.tensor("gate", 1)
    np.testing.assert_array_equal(gate, RandomWeights(TINY).tensor("gate", 1))
    for other in (weights.tensor("up", 1), weights.tensor("gate", 0), RandomWeights(TINY, seed=1).tensor("gate", 1)):
        assert abs(np.corrcoef(gate.ravel(), other.ravel())[0, 1]) < 0.05
    assert np.std(gate) == pytest.approx(TINY.hidden_size**-0.5, rel=0.02)


@pytest.mark.parametrize("config", GGUF_CONFIGS.values(), ids=GGUF_CONFIGS)
def test_the_gguf_file_holds_the_same_weights(tmp_path: Path, config: ModelConfig) -> None:
    """Read back with the converter, so that names and the order of q and k are checked too."""
    weights = RandomWeights(config)
    write_gguf(tmp_path / "m.gguf", config, "q8_0", weights.tensor)
    convert(tmp_path / "m.gguf", tmp_path / "back.svdp", "f32")
    with read_model_file(tmp_path / "back.svdp") as file:
        assert file.config == config
        found = float32_weights(file.config, file.arrays, file.formats)
        for spec in tensor_specs(config):
            layers = [weights.tensor(spec.name, i) for i in range(spec.shape[0] if spec.stacked else 1)]
            expected = np.stack(layers) if spec.stacked else layers[0]
            assert np.abs(found[spec.name] - expected).max() <= np.abs(expected).max() / 127
    assert [path.name for path in tmp_path.glob("*.partial")] == []


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
@pytest.mark.parametrize("config", GGUF_CONFIGS.values(), ids=GGUF_CONFIGS)
def test_llama_cpp_makes_the_same_of_the_gguf_file(tmp_path: Path, config: ModelConfig, kind: str) -> None:
    pytest.importorskip("llama_cpp")
    from svdengine.tools.llama_cpp_model import LlamaCppModel

    if not config.expert_count:
        config = replace(config, hidden_size=256, ffn_size=512, head_dim=64)
    weights = RandomWeights(config)
    write_gguf(tmp_path / "m.gguf", config, kind, weights.tensor)
    write_svdp(tmp_path / "m.svdp", config, "q8")
    tokens = random_tokens(config, 20)
    with LlamaCppModel(tmp_path / "m.gguf", threads=1, context=64, rows=32) as model:
        theirs = model.decode(tokens, every=True).copy()
        assert model.vocab_size == config.vocab_size
    correlation = np.corrcoef(theirs.ravel(), run(tmp_path / "m.svdp", tokens).ravel())[0, 1]
    assert correlation > (0.999 if kind == "q8_0" else 0.97)


def test_a_config_that_llama_cpp_has_no_graph_for_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for config in (
        replace(TINY, activation="relu"),
        replace(GGUF_CONFIGS["smallthinker"], activation="silu"),
        replace(TINY, family="olmoe"),
        replace(TINY, hidden_size=120),
    ):
        with pytest.raises(ValueError):
            write_gguf(tmp_path / "m.gguf", config, "q8_0", RandomWeights(config).tensor)
    assert not list(tmp_path.iterdir())


def test_a_shape_takes_another_number_of_layers_and_another_activation() -> None:
    config = shape_config("llama2-7b", 3, "relu")
    assert (config.layer_count, config.activation, config.hidden_size) == (3, "relu", 4096)
    assert any(spec.name == "down_T" for spec in tensor_specs(config))
    assert shape_config("smollm2-135m").layer_count == 30
    for layers, activation in ((0, "silu"), (1, "sine")):
        with pytest.raises(ValueError):
            shape_config("llama2-7b", layers, activation)


def test_a_shape_that_llama_cpp_does_not_have_is_refused(tmp_path: Path) -> None:
    config: ModelConfig = replace(TINY, activation="relu")
    with pytest.raises(ValueError, match="use silu"):
        write_gguf(tmp_path / "m.gguf", config, "q8_0", RandomWeights(config).tensor)
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_both_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(random_model.SHAPES, "llama2-7b", TINY)
    random_model.main(["--layers", "1", "--dtype", "q4", "--gguf", "q4_0", "-o", str(tmp_path / "out.svdp")])
    assert {path.name for path in tmp_path.iterdir()} == {"out.svdp", "out.gguf"}
    assert "out.gguf" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="error: "):
        random_model.main(["--layers", "1", "-o", str(tmp_path / "missing" / "out.svdp")])
