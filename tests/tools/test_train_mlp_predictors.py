"""Training of PowerInfer-style predictors: that they learn, what is written, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_model import write_tiny_model

from svdengine.converters.gguf_file import read_gguf
from svdengine.converters.powerinfer import open_powerinfer
from svdengine.converters.predictor_quality import mean_auroc
from svdengine.files.model_file import read_model_file
from svdengine.tools import train_mlp_predictors
from svdengine.tools.train_mlp_predictors import Training, train_network, write_gguf

TEXT = "once upon a time there was a user and a system, hello world. what is 2 + 2? the assistant says: 4. " * 40


def examples(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs whose sizes differ by channel, and neurons of which about 1 in 7 is active."""
    random = np.random.default_rng(0)
    x = random.standard_normal((n, 40), np.float32) * np.geomspace(0.1, 10, 40, dtype=np.float32)
    weights = random.standard_normal((60, 40), np.float32) / np.geomspace(0.1, 10, 40, dtype=np.float32)
    gates = x @ weights.T
    return x, gates > 1.1 * gates.std(0)


def test_networks_learn_which_neurons_are_active_and_miss_few() -> None:
    x, active = examples(3000)
    steps: list[int] = []
    network = train_network(x[:2000], active[:2000], Training(rank=64, epochs=30), lambda: steps.append(1))
    assert network.first.shape == (64, 40) and network.second.shape == (60, 64) and len(steps) == 30
    assert network.first.dtype == network.second.dtype == np.float32
    found, truth = network.scores(x[2000:]), active[2000:]
    assert mean_auroc(found, truth) > 0.95
    assert (found > 0)[truth].mean() > 0.85 and (found > 0).mean() < 0.35
    again = train_network(x[:2000], active[:2000], Training(rank=64, epochs=30))
    np.testing.assert_allclose(again.scores(x[2000:]), found, rtol=1e-2, atol=1e-2)


def test_a_model_file_gets_networks_that_can_be_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, text, output = tmp_path / "m.svdp", tmp_path / "text.txt", tmp_path / "p.gguf"
    write_tiny_model(model)
    text.write_text(TEXT, encoding="utf-8")
    options = ["--tokens", "2000", "--rank", "100", "--epochs", "4", "--threads", "1"]
    train_mlp_predictors.main([str(model), "--text", str(text), "-o", str(output), *options])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["layer", "0", "1", "mean"]
    assert float(lines[-1].split()[1]) > 0.9  # AUROC
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.svdp", "p.gguf", "text.txt"]
    with read_model_file(model) as file:
        networks = open_powerinfer(output, file, trained_thresholds=True)
        assert networks.gguf.fields["llama.block_count"] == 2
        assert networks.read_layer(1).first.shape == (100, file.config.hidden_size)


def test_what_is_written_is_for_the_input_of_the_norm(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "m.svdp")
    with read_model_file(tmp_path / "m.svdp") as file:
        weights = np.asarray(file.arrays["ffn_norm.weight"])
        network = train_mlp_predictors.Network(
            np.random.default_rng(0).standard_normal((8, file.config.hidden_size), np.float32),
            np.random.default_rng(1).standard_normal((file.config.ffn_size, 8), np.float32),
        )
        write_gguf(tmp_path / "p.gguf", file.config, [network, network], weights)
        written = read_gguf(tmp_path / "p.gguf")
        np.testing.assert_allclose(written.read("blk.1.fc1.weight"), network.first * weights[1], rtol=1e-3, atol=1e-6)
        found = open_powerinfer(tmp_path / "p.gguf", file).read_layer(1)
        np.testing.assert_allclose(found.first, network.first, rtol=2e-3, atol=1e-5)
        np.testing.assert_allclose(found.second, network.second, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("activation", "options", "message"),
    [
        ("relu", ["--rank", "151"], r"--rank must lie in 1\.\.150"),
        ("relu", ["--text", "missing.txt"], r"missing\.txt: cannot be read"),
        ("silu", [], "silu has no zeros"),
    ],
)
def test_what_cannot_be_trained(tmp_path: Path, activation: str, options: list[str], message: str) -> None:
    write_tiny_model(tmp_path / "m.svdp", activation=activation)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    arguments = [str(tmp_path / "m.svdp"), "--text", str(tmp_path / "text.txt"), "-o", str(tmp_path / "p.gguf")]
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        train_mlp_predictors.main([*arguments, "--threads", "1", *options])
    assert not (tmp_path / "p.gguf").exists()


def test_without_torch_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match=r"^error: training needs PyTorch; run: pip install torch$"):
        train_mlp_predictors.main([str(tmp_path / "m.svdp"), "--text", "t", "-o", "p.gguf"])
